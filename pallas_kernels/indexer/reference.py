"""The contract of the index scores, in plain jnp."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def index_scores(
    q: Float[Array, "B T N J"], k: Float[Array, "B S J"], w: Float[Array, "B T N"]
) -> Float[Array, "B T S"]:
    """``Σ_n w · ReLU(q · k)``: see ``api.index_scores``."""
    products = jnp.einsum("btnj,bsj->btns", q, k, preferred_element_type=jnp.float32)
    return jnp.sum(w.astype(jnp.float32)[..., None] * jax.nn.relu(products), axis=2)

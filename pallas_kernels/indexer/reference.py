"""The contract of the index scores, in plain jnp."""

import jax
import jax.numpy as jnp

from pallas_kernels.accumulate import einsum
from pallas_kernels.shapes import Array, Float
from pallas_kernels.visibility import Visibility


def index_scores(
    q: Float[Array, "B T N J"],
    k: Float[Array, "B S J"],
    w: Float[Array, "B T N"],
    visibility: Visibility,
    k_scale: Float[Array, "B S"] | None = None,
) -> Float[Array, "B T S"]:
    """``Σ_n w · ReLU(q · k) · k_scale``: see ``api.index_scores``."""
    if q.dtype == jnp.float8_e4m3fn:
        q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    scores = _weighted(einsum("btnj,bsj->btns", q, k), w)
    if k_scale is not None:
        scores *= k_scale[:, None, :]
    return jnp.where(visibility.mask(), scores, -jnp.inf)


def listed_index_scores(
    q: Float[Array, "B T N J"], k: Float[Array, "B T K J"], w: Float[Array, "B T N"]
) -> Float[Array, "B T K"]:
    """The same where every query has keys of its own."""
    return _weighted(einsum("btnj,btkj->btnk", q, k), w)


def _weighted(products: Float[Array, "B T N S"], w: Float[Array, "B T N"]) -> Float[Array, "B T S"]:
    return jnp.sum(w.astype(products.dtype)[..., None] * jax.nn.relu(products), axis=2)

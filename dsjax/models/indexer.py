"""The lightning indexer: small heads that score every earlier token for every query."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsjax.config import ModelConfig
from dsjax.models.linear import Linear
from dsjax.models.norms import LayerNorm
from dsjax.models.rope import Rope, rotate_half
from dsjax.precision.act_quant import fake_quant
from dsjax.precision.hadamard import rotate


class IndexQuery(NamedTuple):
    """What a query brings to the index scores."""

    q: Float[Array, "B T N J"]
    w: Float[Array, "B T N"]  # float32, constant factors included


class LightningIndexer(nnx.Module):
    """``I[t, s] = Σ_n w[t, n] · J^-0.5 · ReLU(q[t, n] · k[s])`` with one key shared by all N heads.

    The rotary part comes first in a head and turns in the half-split layout, both unlike MLA. With
    ``index_precision="exact"`` q and k are rotated by a Hadamard matrix and rounded to e4m3 as in the released
    code; "plain" leaves both out, since the rotation preserves dot products. The inputs are detached: only the
    indexer loss reaches these parameters, and it reaches nothing else.

    Source: V3.2-Exp report §1; checkpoint keys ``self_attn.indexer.{wq_b,wk,k_norm,weights_proj}``.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        heads, width, std = config.index_n_heads, config.index_head_dim, config.initializer_range
        dtype = config.param_dtype

        def projection(shape, axes, *, keep=False):
            return Linear(shape, axes, std=std, param_dtype=dtype, rngs=rngs, keep=keep)

        self.wq_b = projection(
            (config.q_lora_rank, heads, width), ("q_lora", "index_heads", "index_head_dim")
        )
        self.wk = projection((config.hidden_size, width), ("embed", "index_head_dim"), keep=True)
        self.k_norm = LayerNorm(width, eps=1e-6, axis="index_head_dim")
        self.weights_proj = projection((config.hidden_size, heads), ("embed", "index_heads"), keep=True)

    def query(self, x: Float[Array, "B T D"], q_latent: Float[Array, "B T Q"], rope: Rope) -> IndexQuery:
        """Index queries and head weights of the tokens ``x``."""
        x, q_latent = jax.lax.stop_gradient((x, q_latent))
        q = self._finish(self.wq_b(q_latent), rope)
        w = self.weights_proj(x, out_dtype=jnp.float32)
        constant = self.config.index_n_heads**-0.5 * self.config.index_head_dim**-0.5
        return IndexQuery(q, w * constant)

    def key(self, x: Float[Array, "B S D"], rope: Rope) -> Float[Array, "B S J"]:
        """Index keys of the tokens ``x``: what the cache keeps."""
        return self._finish(self.k_norm(self.wk(jax.lax.stop_gradient(x))), rope)

    def _finish(self, x: Float[Array, "B T *N J"], rope: Rope) -> Float[Array, "B T *N J"]:
        turned, rest = jnp.split(x, [self.config.qk_rope_head_dim], axis=-1)
        x = jnp.concatenate([rotate_half(turned, rope), rest], axis=-1)
        return fake_quant(rotate(x)) if self.config.index_precision == "exact" else x

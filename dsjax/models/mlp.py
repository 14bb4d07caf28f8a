"""The SwiGLU feed-forward network."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsjax.config import ModelConfig
from dsjax.models.linear import Linear


def swiglu(gate: Float[Array, "*B F"], up: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """``SiLU(gate) · up``, in float32, returned in the dtype of ``gate``."""
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


class SwiGLU(nnx.Module):
    """``y = W_down (SiLU(W_gate x) · W_up x)``: dense layers and shared experts.

    Source: checkpoint keys ``mlp.{gate,up,down}_proj.weight``, ``mlp.shared_experts.*``.
    """

    def __init__(self, config: ModelConfig, width: int, *, rngs: nnx.Rngs):
        std, dtype = config.initializer_range, config.param_dtype
        into, back = (config.hidden_size, width), (width, config.hidden_size)
        self.gate_proj = Linear(into, ("embed", "mlp"), std=std, param_dtype=dtype, rngs=rngs, keep=True)
        self.up_proj = Linear(into, ("embed", "mlp"), std=std, param_dtype=dtype, rngs=rngs, keep=True)
        self.down_proj = Linear(back, ("mlp", "embed"), std=std, param_dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))

"""Bias-free linear maps between tensors of named axes."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class Linear(nnx.Module):
    """``y = x · W`` over the leading ``contract`` axes of W and the trailing ones of x.

    Heads keep an axis of their own, so ``W`` may have more than two. Computed in the dtype of ``x`` with float32
    accumulation. ``axes`` names every axis of ``weight`` for the sharding rules.

    Source: checkpoint keys ``*_proj.weight`` (stored there as [out, in]).
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        axes: tuple[str, ...],
        *,
        std: float,
        param_dtype: str,
        rngs: nnx.Rngs,
        contract: int = 1,
    ):
        self.contract = contract
        initial = std * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.weight = nnx.Param(initial.astype(param_dtype), axes=axes)

    def __call__(
        self, x: Float[Array, "*B_in"], *, out_dtype: jnp.dtype | None = None
    ) -> Float[Array, "*B_out"]:
        weight = self.weight[...].astype(x.dtype)
        split = x.ndim - self.contract
        width_in = math.prod(weight.shape[: self.contract])
        rows = x.reshape(*x.shape[:split], width_in)
        y = jnp.matmul(rows, weight.reshape(width_in, -1), preferred_element_type=jnp.float32)
        y = y.astype(out_dtype or x.dtype)
        return y.reshape(*x.shape[:split], *weight.shape[self.contract :])

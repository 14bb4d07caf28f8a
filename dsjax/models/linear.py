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
        weight = self.weight[...]
        split = x.ndim - self.contract
        width_in = math.prod(weight.shape[: self.contract])
        y = _product(x.reshape(-1, width_in), weight.reshape(width_in, -1)).astype(out_dtype or x.dtype)
        return y.reshape(*x.shape[:split], *weight.shape[self.contract :])


@jax.custom_vjp
def _product(x: Float[Array, "M I"], weight: Float[Array, "I O"]) -> Float[Array, "M O"]:
    """``x @ weight`` in float32.

    The gradient of the weight is asked for as [I, O]: the automatic rule asks for [O, I] and turns it over, for which
    XLA on CPUs copies whole activations.
    """
    return jnp.matmul(x, weight.astype(x.dtype), preferred_element_type=jnp.float32)


def _forward(x, weight):
    return _product(x, weight), (x, weight)


def _backward(residuals, d_y):
    x, weight = residuals
    d_y = d_y.astype(x.dtype)

    def product(a, b, contract_a: int, contract_b: int):
        dimensions = (((contract_a,), (contract_b,)), ((), ()))
        return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)

    d_x = product(d_y, weight.astype(x.dtype), 1, 1).astype(x.dtype)
    return d_x, product(x, d_y, 0, 0).astype(weight.dtype)


_product.defvjp(_forward, _backward)

"""Bias-free linear maps between tensors of named axes."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from dsjax.parallel.collectives import part_of_sum, per_device, whole
from dsjax.parallel.rules import layout

PRODUCT = "costly_product"  # of outputs that are kept
_WHOLE = PartitionSpec()


class Linear(nnx.Module):
    """``y = x · W`` over the leading ``contract`` axes of W and the trailing ones of x.

    Heads keep an axis of their own, so ``W`` may have more than two. Computed in the dtype of ``x`` with float32
    accumulation. ``axes`` names every axis of ``weight`` for the sharding rules; on a mesh a device gathers the weight
    and multiplies its own tokens. ``keep``: the output is small for what it costs, and a layer that is computed again
    in the backward pass keeps it (``stack.rematerialise``).

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
        keep: bool = False,
    ):
        self.axes, self.contract, self.keep = axes, contract, keep
        initial = std * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.weight = nnx.Param(initial.astype(param_dtype), axes=axes)

    def __call__(
        self, x: Float[Array, "*B_in"], *, out_dtype: jnp.dtype | None = None
    ) -> Float[Array, "*B_out"]:
        weight = self.weight[...]
        lies = layout(weight.shape, *self.axes)
        tokens = x.shape[: x.ndim - self.contract]
        place = layout(tokens, *("batch", "length")[: len(tokens)])

        def own(x: Array, weight: Array) -> Array:
            return linear(x, weight, self.contract, out_dtype, lies)

        y = per_device(own, (place, lies), place)(x, weight)
        return checkpoint_name(y, PRODUCT) if self.keep else y


def linear(
    x: Float[Array, "*B_in"],
    weight: Float[Array, "*in_out"],
    contract: int = 1,
    out_dtype: jnp.dtype | None = None,
    lies: PartitionSpec = _WHOLE,
) -> Float[Array, "*B_out"]:
    """The product of ``Linear`` with a weight at hand, or with this device's part of one that lies in parts."""
    return jnp.asarray(_product(x, weight, contract, lies)).astype(out_dtype or x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x: Float[Array, "*M_in"], weight: Float[Array, "*in_out"], contract: int, lies: PartitionSpec):
    """The product in float32.

    The gradient of the weight is asked for as [I, O]: the automatic rule asks for [O, I] and turns it over, for which
    XLA on CPUs copies whole activations. It is in float32 until the devices' are added up.
    """
    matrix, out = _matrix(weight, x.dtype, contract, lies)
    y = jnp.matmul(_rows(x, contract), matrix, preferred_element_type=jnp.float32)
    return y.reshape(*y.shape[:-1], *out)


def _matrix(weight, dtype, contract: int, lies: PartitionSpec) -> tuple[Array, tuple[int, ...]]:
    """The whole weight as [I, O] in a dtype, and the sizes that O stands for."""
    weight = whole(weight.astype(dtype), lies)
    return weight.reshape(math.prod(weight.shape[:contract]), -1), weight.shape[contract:]


def _rows(x: Float[Array, "*M_in"], contract: int) -> Float[Array, "*M I"]:
    """Tokens keep their axes."""
    return x.reshape(*x.shape[: x.ndim - contract], -1)


def _forward(x, weight, contract, lies):
    return _product(x, weight, contract, lies), (x, weight)


def _backward(contract: int, lies: PartitionSpec, residuals, d_y):
    x, weight = residuals
    rows, (matrix, out) = _rows(x, contract), _matrix(weight, x.dtype, contract, lies)
    d_y = d_y.astype(x.dtype).reshape(*rows.shape[:-1], -1)

    def product(a, b, contract_a: tuple[int, ...], contract_b: tuple[int, ...]):
        dimensions = ((contract_a, contract_b), ((), ()))
        return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)

    tokens = tuple(range(rows.ndim - 1))
    d_x = product(d_y, matrix, (rows.ndim - 1,), (1,)).astype(x.dtype)
    d_weight = product(rows, d_y, tokens, tokens).reshape(*x.shape[x.ndim - contract :], *out)
    return d_x.reshape(x.shape), part_of_sum(d_weight, lies).astype(weight.dtype)


_product.defvjp(_forward, _backward)

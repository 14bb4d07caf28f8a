"""What devices say to each other within ``per_device``; nothing where no axis is named."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from dsjax.parallel.rules import Axes, names_at


def per_device(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """``function`` of each device's own part of the arguments, which lie as the specs say; itself without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return function
    # Kernels do not say along which axes their results vary.
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def gather(x: Array, names: Axes, axis: int) -> Array:
    """The parts of all devices along the axes of the mesh, joined; their gradients are added up."""
    return jax.lax.all_gather(x, names, axis=axis, tiled=True) if names else x


def scatter_sum(x: Array, names: Axes, axis: int) -> Array:
    """Each device's own part of the sum over the devices along the axes."""
    return jax.lax.psum_scatter(x, names, scatter_dimension=axis, tiled=True) if names else x


def sum_over(x: Array, names: Axes) -> Array:
    """The sum over the devices along the axes."""
    return jax.lax.psum(x, names) if names else x


def highest_over(x: Array, names: Axes) -> Array:
    """The greatest over the devices along the axes."""
    return jax.lax.pmax(x, names) if names else x


def place_along(names: Axes) -> Array | int:
    """The number of this device along the axes, the first the slowest."""
    return jax.lax.axis_index(names) if names else 0


def whole(x: Array, lies: PartitionSpec) -> Array:
    """The whole of an array that lies in parts as ``lies`` says.

    One axis of the mesh after another: over all devices at once, XLA for TPUs would send zeros and add up.
    """
    for axis in range(len(lies)):
        for name in reversed(names_at(lies, axis)):
            x = gather(x, (name,), axis)
    return x


def part_of_sum(x: Array, lies: PartitionSpec) -> Array:
    """Each device's part of the sum of whole arrays, as ``lies`` says: what the gradient of ``whole`` is."""
    for axis in reversed(range(len(lies))):
        for name in names_at(lies, axis):
            x = scatter_sum(x, (name,), axis)
    return x


def whole_in(x: Array, lies: PartitionSpec, dtype: jnp.dtype) -> Array:
    """``whole``, rounded to ``dtype`` before it is sent; gradients are added up in the dtype of ``x``."""
    return jnp.asarray(_whole_in(x, lies, dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _whole_in(x: Array, lies: PartitionSpec, dtype: jnp.dtype) -> Array:
    return whole(x.astype(dtype), lies)


def _whole_in_forward(x, lies, dtype):
    return _whole_in(x, lies, dtype), jnp.zeros((), x.dtype)


def _whole_in_backward(lies, dtype, like, d_y):
    return (part_of_sum(d_y.astype(like.dtype), lies),)


_whole_in.defvjp(_whole_in_forward, _whole_in_backward)

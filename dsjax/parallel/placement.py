"""Where a run's arrays lie on its mesh, and how what a process reads becomes its part of a batch."""

import math
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsjax.parallel.rules import constrain, layout, names_at, parameter_layout

Tree = TypeVar("Tree")


def placed(tree: Tree, mesh: Mesh | None) -> Tree:
    """Abstract arrays that say where they lie: variables by their ``axes``, everything else on every device.

    Optimizer moments are variables with the axes of what they belong to. Without a mesh the tree as it is.
    """
    if mesh is None:
        return tree

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return _abstract(leaf, PartitionSpec())
        value = leaf.get_value()
        return leaf.replace(_abstract(value, parameter_layout(value.shape, leaf.axes)))

    def _abstract(x: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        return jax.tree.map(place, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


def shardings(tree: Any) -> Any:
    """Of abstract arrays that say where they lie; None for those that do not."""
    return jax.tree.map(lambda x: x.sharding, tree)


def batch_sharding(mesh: Mesh | None, rows: int) -> NamedSharding | None:
    """Of arrays [B, T] with so many sequences, each whole on its devices until the model shares its tokens out."""
    if mesh is None:
        return None
    with jax.set_mesh(mesh):
        return NamedSharding(mesh, layout((rows,), "batch"))


def rows_here(sharding: NamedSharding | None, rows: int) -> list[int]:
    """Those of a batch of so many rows that the devices of this process have, in their order."""
    if sharding is None:
        return list(range(rows))
    numbers = np.arange(rows)
    parts = sharding.addressable_devices_indices_map((rows,)).values()
    return sorted({int(row) for part in parts for row in numbers[part]})


def whole_batch(batch: Tree, sharding: NamedSharding | None, rows: int) -> Tree:
    """Arrays of all processes, of which ``batch`` has the ``rows_here``; without a mesh the batch as it is."""
    if sharding is None:
        return batch
    place = {row: number for number, row in enumerate(rows_here(sharding, rows))}

    def whole(own: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            first, last = index[0].start or 0, rows if index[0].stop is None else index[0].stop
            return own[place[first] : place[first] + last - first]

        return jax.make_array_from_callback((rows, *own.shape[1:]), sharding, part)

    return jax.tree.map(whole, batch)


def whole_array(x: jax.Array, mesh: Mesh | None) -> np.ndarray:
    """What lies on all devices, on this host; every process must ask for it."""
    if mesh is not None:
        x = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))(x)
    return np.asarray(x)


def in_parts(batch: Tree, count: int) -> Tree:
    """Arrays [B, ...] as [count, B / count, ...], of which every device has its own part: no row moves."""

    def cut(x: jax.Array) -> jax.Array:
        sizes = jax.sharding.get_abstract_mesh().shape
        devices = math.prod(sizes[name] for name in names_at(layout(x.shape[:1], "batch"), 0))
        of_devices = x.reshape(devices, count, -1, *x.shape[1:]).swapaxes(0, 1)
        parts = of_devices.reshape(count, -1, *x.shape[1:])
        return constrain(parts, None, "batch", *[None] * (x.ndim - 1))

    return jax.tree.map(cut, batch)

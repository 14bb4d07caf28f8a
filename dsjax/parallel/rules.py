"""The one table that maps the logical axes of arrays to the axes of the mesh.

The model names logical axes only: ``axes`` of its variables, and ``layout`` and ``constrain`` for activations. A mesh
is in use within ``jax.set_mesh``; outside of one, everything here says that nothing is shared out.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Rules:
    """Mesh axes of each logical axis. In an array a mesh axis is used once, by the logical axis that is first here."""

    # Activations
    batch: Axes = ("data", "fsdp", "expert")
    length: Axes = ("context", "tensor")
    # Parameters
    experts: Axes = ("expert", "tensor")
    vocab: Axes = ("expert", "tensor")
    columns: Axes = ("fsdp", "context", "expert", "tensor")  # of the embedding, whose rows are anybody's
    heads: Axes = ("tensor",)
    index_heads: Axes = ("tensor",)
    mlp: Axes = ("tensor",)
    embed: Axes = ("fsdp", "context", "expert")
    embed_pair: Axes = ("fsdp", "context", "expert")
    q_lora: Axes = ("fsdp", "context", "expert")
    kv_lora: Axes = ("fsdp", "context", "expert")


RULES = Rules()
_GATHERED = ("embed", "embed_pair", "q_lora", "kv_lora")  # before a product, by ``collectives.whole``
_ORDER = [field.name for field in dataclasses.fields(Rules)]


def layout(shape: Sequence[int], *axes: str | None) -> PartitionSpec:
    """How an array with these logical axes lies on the mesh in use.

    Of the mesh axes of a logical one, the last are left out until the rest divide its size.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    found: dict[int, Axes] = {}
    used: set[str] = set()
    for place in sorted(range(len(axes)), key=lambda place: _priority(axes[place])):
        wanted = getattr(RULES, axes[place] or "", ())
        names = tuple(name for name in wanted if sizes.get(name, 1) > 1 and name not in used)
        if axes[place] in _GATHERED:  # axis after axis, from the last: all but the largest group send little
            names = tuple(sorted(names, key=lambda name: -sizes[name]))
        if axes[place] == "length":
            names = length_axes(shape[place])
        while shape[place] % math.prod(sizes[name] for name in names):
            names = names[:-1]
        found[place] = names
        used |= set(names)
    return PartitionSpec(*(found[place] or None for place in range(len(axes))))


def length_axes(length: int) -> Axes:
    """The axes over which a sequence of so many tokens is shared out: all of its axes, or none.

    Every device has two pieces of a sequence (``order``).
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    names = tuple(name for name in RULES.length if sizes.get(name, 1) > 1)
    return () if length % (2 * math.prod(sizes[name] for name in names)) else names


def _priority(axis: str | None) -> int:
    return _ORDER.index(axis) if axis in _ORDER else len(_ORDER)


def parameter_layout(shape: Sequence[int], axes: Sequence[str]) -> PartitionSpec:
    """How a variable lies on the mesh in use: as ``layout`` says, but vectors are on every device."""
    if sum(axis != "layers" for axis in axes) < 2:
        return PartitionSpec()
    return layout(shape, *axes)


def names_at(spec: PartitionSpec, place: int) -> Axes:
    """The mesh axes over which an array is cut at a place."""
    names = spec[place] if place < len(spec) else None
    return (names,) if isinstance(names, str) else tuple(names or ())


def constrain(x: Array, *axes: str | None) -> Array:
    """``x``, which is to lie on the mesh in use by its logical axes."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, layout(x.shape, *axes))

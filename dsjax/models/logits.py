"""Logits of a few tokens, as sampling wants them, no device with a whole vocabulary."""

import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from dsjax.parallel.collectives import gather, per_device
from dsjax.parallel.rules import layout, names_at


def logits_of(hidden: Float[Array, "*B D"], head: Float[Array, "D V"]) -> Float[Array, "*B V"]:
    """``hidden · head`` in float32.

    A device has some columns of the head, and is given the tokens of all with which it shares them.
    """
    tokens = hidden.shape[:-1]
    place, lies = layout(tokens, *("batch", "length")[: len(tokens)]), layout(head.shape, "embed", "vocab")
    inner, columns = names_at(lies, 0), names_at(lies, 1)
    shared = [tuple(n for n in names_at(place, axis) if n in columns) for axis in range(len(tokens))]
    rest = [tuple(n for n in names_at(place, axis) if n not in columns) for axis in range(len(tokens))]

    def own(hidden: Array, head: Array) -> Array:
        for axis, names in enumerate(shared):
            hidden = gather(hidden, names, axis)
        head = gather(head.astype(hidden.dtype), inner, 0)
        return jnp.matmul(hidden, head, preferred_element_type=jnp.float32)

    out = PartitionSpec(*(names or None for names in rest), columns or None)
    return per_device(own, (PartitionSpec(*place, None), lies), out)(hidden, head)

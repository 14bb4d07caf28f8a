"""In which order the tokens of a sequence are shared out, so that causal attention costs every device the same.

A sequence over n devices is cut into 2n pieces, and device i has the pieces i and 2n - 1 - i: one whose queries see
few keys, and one whose queries see many.
"""

import math
from typing import TypeVar

import jax
import numpy as np
from jaxtyping import Int

from dsjax.parallel.rules import length_axes

Tree = TypeVar("Tree")


def places(length: int) -> Int[np.ndarray, "T"]:
    """The place in its sequence of each token in the order of the devices; without a mesh 0, 1, 2, …"""
    sizes = jax.sharding.get_abstract_mesh().shape
    devices = math.prod(sizes[name] for name in length_axes(length))
    pieces = np.arange(length, dtype=np.int32).reshape(2 * devices if devices > 1 else 1, -1)
    if devices == 1:
        return pieces[0]
    return np.stack([pieces[:devices], pieces[: devices - 1 : -1]], axis=1).reshape(-1)


def shared_out(tree: Tree) -> Tree:
    """Arrays [B, T, ...] with the tokens in the order of the devices."""
    return jax.tree.map(lambda x: x[:, places(x.shape[1])] if length_axes(x.shape[1]) else x, tree)


def in_order(tree: Tree) -> Tree:
    """The inverse of ``shared_out``."""
    return jax.tree.map(
        lambda x: x[:, np.argsort(places(x.shape[1]))] if length_axes(x.shape[1]) else x, tree
    )

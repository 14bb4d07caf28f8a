"""Rows that go to the devices that have their experts and come back, in rounds of a bounded size.

What a device sends for one expert is one slice, as its rows lie in the order of their experts; and what comes for one
expert, from all devices, lies together. All rows that a device is to get are numbered, by expert and then by sender;
round t brings it those from t · capacity on. Only counts are known to everybody: of rows for each expert from each
device.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dsjax.parallel.collectives import place_along
from dsjax.parallel.rules import Axes
from pallas_kernels import platform


class Slices(NamedTuple):
    """What one device sends to each, where it lies there, and what it gets; of n devices E/n slices each."""

    start: Int[Array, "E"]
    size: Int[Array, "E"]
    start_there: Int[Array, "E"]
    size_from: Int[Array, "E"]


class Round(NamedTuple):
    """A round as one device sees it."""

    there: Slices  # to the experts
    back: Slices
    sizes: Int[Array, "E/n"]  # rows that are here for each of its experts, one behind the other


class Exchange(NamedTuple):
    """How rows are exchanged by the devices of a group, of which each has E/n experts."""

    counts: Int[Array, "n E"]  # rows of each device for each expert, the same on all of the group
    capacity: int  # rows that a device takes in a round
    names: Axes  # of the mesh, along which the group lies

    @property
    def rounds(self) -> Int[Array, ""]:
        """So many that every device of the group has got its rows."""
        to_each = jnp.sum(self.counts.reshape(len(self.counts), len(self.counts), -1), axis=(0, 2))
        return jnp.max(-(-to_each // self.capacity))

    def round(self, number: Int[Array, ""]) -> Round:
        """What this device does in a round."""
        devices, me = self.counts.shape[0], place_along(self.names)
        counts = self.counts.reshape(devices, devices, -1)  # [from, to, expert]
        of_expert = jnp.sum(counts, axis=0)
        # In the numbering of its receiver, of the rows for an expert, and of each device's among them.
        first = (jnp.cumsum(of_expert, axis=1) - of_expert)[None] + jnp.cumsum(counts, axis=0) - counts
        begin, end = (jnp.clip((number + n) * self.capacity - first, 0, counts) for n in (0, 1))
        size = end - begin
        start = (jnp.cumsum(self.counts, axis=1) - self.counts).reshape(counts.shape) + begin
        start_there = jnp.where(size > 0, first + begin - number * self.capacity, 0)

        def slices(*parts: Int[Array, "n E/n"]) -> Slices:
            return Slices(*(part.reshape(-1) for part in parts))

        there = slices(start[me], size[me], start_there[me], size[:, me])
        back = slices(start_there[:, me], size[:, me], start[:, me], size[me])
        return Round(there, back, jnp.sum(size[:, me], axis=0))


def send(rows: Array, into: Array, slices: Slices, names: Axes) -> Array:
    """``into`` with what the devices along the axes sent here of their ``rows``."""
    if platform.target() == "cpu":  # where XLA has no such operation
        return _send_by_gathering(rows, into, slices, names)
    arguments = slices.start, slices.size, slices.start_there, slices.size_from
    return jax.lax.ragged_all_to_all(rows, into, *arguments, axis_name=names)


def _send_by_gathering(rows: Array, into: Array, slices: Slices, names: Axes) -> Array:
    """Everything on every device, for machines on which this is tried out."""
    rows, slices = jax.tree.map(lambda x: jax.lax.all_gather(x, names), (rows, slices))
    devices, place = rows.shape[0], jnp.arange(into.shape[0])

    def take(device: Array, into: Array) -> Array:
        start, size, start_there, _ = (
            part[device].reshape(devices, -1)[place_along(names)] for part in slices
        )
        of_slice = place - start_there[:, None]  # [slice, place]
        comes = (of_slice >= 0) & (of_slice < size[:, None])
        row = jnp.sum(jnp.where(comes, of_slice + start[:, None], 0), axis=0)
        any_comes = jnp.any(comes, axis=0).reshape(-1, *[1] * (into.ndim - 1))
        return jnp.where(any_comes, rows[device, row], into)

    return jax.lax.fori_loop(0, devices, take, into)

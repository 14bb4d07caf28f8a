"""From a mask to a list, within a TPU kernel: one vector program where the scalar core would visit every key.

Keys stand in rows of 128 lanes. Those set move to the left of their row, each by as many lanes as are free before
it, a power of two at a time. A row then turns until its first key is at the lane where the list has come to, which is
a power of two at a time again; and products with zeros and ones, which are exact on bytes, add rows that belong to
the same row of the list.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blocks import LANES, round_up
from pallas_kernels.pairs import product
from pallas_kernels.shapes import Array, Int

PLACE_BITS = 23  # of an entry: where a key lies, below the bits that say which queries selected it
_ROWS = 256  # of keys at a time
_WINDOW = 128  # rows of the list that are added to at a time
_SUBLANES = 8


def rows_at_a_time(keys: int) -> int:
    """Rows of keys that are worked on together: what a mask is to be padded to a multiple of."""
    return min(_ROWS, round_up(-(-keys // LANES), _SUBLANES))


def entries_shape(rows: int) -> tuple[int, int]:
    """Of the list of a mask of so many rows, with room for a window that begins at its end."""
    return rows + 2 * _WINDOW, LANES


def list_set(words: Any, places: Any, entries: Any) -> Int[Array, ""]:
    """Writes ``place | word << 23`` of every key whose word [rows, 128] is not 0 to ``entries``, in order; how many.

    Places behind the last hold 0. Words have up to 8 bits.
    """
    rows = min(_ROWS, words.shape[0])
    entries[...] = jnp.zeros_like(entries)
    lane = jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)
    earlier_lane, earlier_row = _before(LANES, 0), _before(rows, 1)

    def list_piece(piece, listed):
        own = pl.ds(pl.multiple_of(piece * rows, _SUBLANES), rows)
        word = words[own, :]
        is_set = jnp.where(word != 0, 1.0, 0.0).astype(jnp.bfloat16)
        rank = product(is_set, earlier_lane, 1, 0).astype(jnp.int32)
        number = product(is_set, jnp.ones((LANES, LANES), jnp.bfloat16), 1, 0)
        before = product(earlier_row, number.astype(jnp.bfloat16), 1, 0)
        start = listed + before.astype(jnp.int32)
        entry = places[own, :] | (word << PLACE_BITS)
        entry = _to_the_left(entry, jnp.where(word != 0, lane - rank, 0))
        offset = start & (LANES - 1)
        entry = _turned(entry, offset)
        entry = jnp.where((lane - offset) & (LANES - 1) < number.astype(jnp.int32), entry, 0)
        first = listed // (LANES * _SUBLANES) * _SUBLANES
        target = (start >> LANES.bit_length() - 1) - first
        parts = (
            (target, jnp.where(lane >= offset, entry, 0)),
            (target + 1, jnp.where(lane < offset, entry, 0)),
        )

        def add_window(w, _):
            window = pl.ds(pl.multiple_of(first + w * _WINDOW, _SUBLANES), _WINDOW)
            for target, part in parts:
                entries[window, :] |= _moved(part, target - w * _WINDOW)
            return 0

        windows = (jnp.max(target) + 1) // _WINDOW + 1
        jax.lax.fori_loop(0, windows, add_window, 0)
        return jnp.max(start + number.astype(jnp.int32))

    return jax.lax.fori_loop(0, words.shape[0] // rows, list_piece, jnp.int32(0))


def _before(size: int, axis: int) -> Array:
    """Ones where the index along the axis is the lower one."""
    own, other = (jax.lax.broadcasted_iota(jnp.int32, (size, size), a) for a in (axis, 1 - axis))
    return jnp.where(own < other, 1.0, 0.0).astype(jnp.bfloat16)


def _to_the_left(entry: Int[Array, "R L"], distance: Int[Array, "R L"]) -> Int[Array, "R L"]:
    """Each entry by its distance. From the lowest bit on, nobody meets anybody: in between there are no more steps."""
    step = 1
    while step < LANES:
        arriving = pltpu.roll(distance, LANES - step, 1)
        arrives = (arriving & step) != 0
        entry = jnp.where(arrives, pltpu.roll(entry, LANES - step, 1), entry)
        distance = jnp.where(arrives, arriving, jnp.where((distance & step) != 0, 0, distance))
        step *= 2
    return entry


def _turned(entry: Int[Array, "R L"], distance: Int[Array, "R L"]) -> Int[Array, "R L"]:
    """Each row to the right by its distance, around the end."""
    step = 1
    while step < LANES:
        entry = jnp.where((distance & step) != 0, pltpu.roll(entry, step, 1), entry)
        step *= 2
    return entry


def _moved(entry: Int[Array, "R L"], target: Int[Array, "R L"]) -> Int[Array, "W L"]:
    """Each row in the row of a window that ``target`` says; where several are to be in one, their sum."""
    there = jax.lax.broadcasted_iota(jnp.int32, (entry.shape[0], _WINDOW), 1) == target[:, :1]
    there, total = jnp.where(there, 1.0, 0.0).astype(jnp.bfloat16), jnp.zeros((_WINDOW, LANES), jnp.int32)
    for shift in range(0, 32, 8):
        octets = ((entry >> shift) & 255).astype(jnp.float32).astype(jnp.bfloat16)
        total |= product(there, octets, 0, 0).astype(jnp.int32) << shift
    return total

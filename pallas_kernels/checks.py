"""Arguments that an operation cannot take, each refused in one sentence before anything runs."""

import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from pallas_kernels.platform import UnsupportedError, debugging
from pallas_kernels.selection import require_mask
from pallas_kernels.shapes import Array, Bool, Int, UInt32
from pallas_kernels.triton import power_of_two
from pallas_kernels.visibility import Visibility

Named = Mapping[str, tuple[Array, str]]  # an argument's name, and the letters of its axes


def limits(visibility: Visibility) -> Named:
    """The parts of a visibility, for ``shapes``."""
    letters = ("B T", "B T", "B S")
    return {
        f"visibility.{name}": (array, axes)
        for name, array, axes in zip(visibility._fields, visibility, letters, strict=True)
    }


def shapes(op: str, arguments: Named) -> None:
    """Raises UnsupportedError unless every argument has an axis for each of its letters, of one size a letter.

    ``shapes("sparse_mla", {"q": (q, "B T H X"), "kv": (kv, "B S X")})``: the first with a letter decides its size.
    """
    sizes: dict[str, tuple[int, str]] = {}
    for name, (array, letters) in arguments.items():
        axes = letters.split()
        known = [f"{axis} = {sizes[axis][0]} as in {sizes[axis][1]}" for axis in axes if axis in sizes]
        fits = array.ndim == len(axes) and 0 not in array.shape
        for axis, size in zip(axes, array.shape, strict=False):
            fits &= sizes.setdefault(axis, (size, name))[0] == size
        if not fits:
            known += ["none of them 0"] * (0 in array.shape)
            wanted = ", ".join([f"[{', '.join(axes)}]", *known])
            raise UnsupportedError(f"{op}: {name} is {_kind(array)}, and it should be {wanted}")


def floats(op: str, arguments: Mapping[str, Array], *, kernel: bool) -> None:
    """Raises UnsupportedError unless every argument is in bfloat16 or float32; or, where no kernel runs, in float64."""
    for name, array in arguments.items():
        if array.dtype == jnp.float64 and kernel:
            raise UnsupportedError(
                f"{op}: {name} is {_kind(array)}, and kernels compute in float32 at most: cast it to float32, or name "
                "implementation='reference'"
            )
        if array.dtype not in (jnp.bfloat16, jnp.float32, jnp.float64):
            raise UnsupportedError(
                f"{op}: {name} is {_kind(array)}, and it should be bfloat16 or float32: cast it"
            )


def integers(op: str, arguments: Named) -> None:
    """Raises UnsupportedError unless every argument is int32."""
    for name, (array, _) in arguments.items():
        if array.dtype != jnp.int32:
            raise UnsupportedError(f"{op}: {name} is {_kind(array)}, and it should be int32: cast it")


def alike(op: str, arguments: Mapping[str, Array]) -> None:
    """Raises UnsupportedError unless all arguments have the dtype of the first."""
    (first, model), *others = arguments.items()
    for name, array in others:
        if array.dtype != model.dtype:
            raise UnsupportedError(
                f"{op}: {name} is {_kind(array)}, and it should be {model.dtype} as {first} is: cast one of them"
            )


def positive(op: str, name: str, number: Any) -> int:
    """The number; raises UnsupportedError unless it is at least 1, and known when the program is made."""
    try:
        value = operator.index(number)
    except TypeError:
        raise UnsupportedError(
            f"{op}: {name} is {number!r}, and it should be a whole number, known when the program is made: give an int "
            "(jax.jit takes it among static_argnames)"
        ) from None
    if value < 1:
        raise UnsupportedError(f"{op}: {name} is {value}, and it should be at least 1")
    return value


def latent_dim_within(op: str, latent_dim: int, width: int) -> None:
    """Raises UnsupportedError unless a latent and a rotary part make up a row of that width."""
    if not 1 <= latent_dim < width:
        raise UnsupportedError(
            f"{op}: latent_dim is {latent_dim}, and rows are {width} wide: it should be from 1 to {width - 1}, as a "
            "rotary part follows the latent"
        )


def rows_fit_gpu(op: str, latent_dim: int, rows: Array) -> None:
    """Raises UnsupportedError unless tiles of such rows [B, S, C+R] fit the shared memory of a Hopper multiprocessor.

    As compiled for an H100 with 64 heads a block: what is wider is refused by its compiler.
    """
    most = 320 if rows.dtype == jnp.float32 else 576
    width = power_of_two(latent_dim) + power_of_two(rows.shape[-1] - latent_dim)
    if width > most:
        raise UnsupportedError(
            f"{op}: rows are {latent_dim} + {rows.shape[-1] - latent_dim} wide in {rows.dtype}, {width} as the powers "
            f"of two that the GPU kernel reads, and it has memory for {most}: use bfloat16, narrower ones, or "
            "implementation='reference'"
        )


def selection_of(
    op: str, selection: Array, batch: int, queries: int, keys: int | None = None
) -> Int[Array, "B T K"] | UInt32[Array, "B W S"]:
    """The selection, a list or a packed mask (``selection``) of so many keys, if that is known.

    Raises UnsupportedError for what is neither; within ``platform.debug()``, also for a list as ``indices_within``
    says.
    """
    if selection.ndim != 3 or selection.dtype not in (jnp.int32, jnp.uint32):
        raise UnsupportedError(
            f"{op}: selection is {_kind(selection)}, and it should be a list of indices int32[B, T, K] or a packed "
            "mask uint32[B, W, S]: make it with topk.select, or cast it"
        )
    is_list = selection.dtype == jnp.int32
    if not is_list:
        require_mask(op, selection, queries, selection.shape[2] if keys is None else keys)
    if selection.shape[0] != batch or (is_list and selection.shape[1] != queries):
        raise UnsupportedError(
            f"{op}: selection is {_kind(selection)}, and it should be of {queries} queries in a batch of {batch}"
        )
    return selection if keys is None or not is_list else indices_within(op, selection, keys)


def indices_within(op: str, indices: Int[Array, "B T K"], keys: int) -> Int[Array, "B T K"]:
    """The list; within ``platform.debug()`` only if every index is -1 or a key, and none stands twice in a row.

    Raises UnsupportedError where the list is known. Within jax.jit it is not: there the program stops before it uses
    the list, with jax's own JaxRuntimeError, whose text has the same sentence.
    """
    if not debugging():
        return indices

    def refuse(found, batch, query, index):
        if not found:
            return found
        what = "twice" if 0 <= index < keys else "where there is no such key"
        raise UnsupportedError(
            f"{op}: batch {batch}, query {query} of the selection has index {index} {what}: indices are from 0 to "
            f"{keys - 1}, or -1 for an empty place, and each stands once in a row"
        )

    wrong = _first_wrong(indices, keys)
    if not isinstance(wrong[0], Tracer):
        refuse(*map(int, wrong))
        return indices
    # What comes back is used, so that nothing runs before the answer.
    found = jax.pure_callback(refuse, jax.ShapeDtypeStruct((), bool), *wrong, vmap_method="sequential")
    return jnp.where(found, -1, indices)


def _first_wrong(indices: Int[Array, "B T K"], keys: int) -> tuple[Bool[Array, ""], Array, Array, Array]:
    """Whether any index is wrong, and batch, query and index of the first that is."""
    indices = jnp.sort(indices, axis=-1)
    repeated = jnp.pad(indices[..., 1:] == indices[..., :-1], [(0, 0), (0, 0), (1, 0)])
    wrong = (indices < -1) | (indices >= keys) | (repeated & (indices >= 0))
    place = jnp.unravel_index(jnp.argmax(wrong), wrong.shape)
    return jnp.any(wrong), place[0], place[1], indices[place]


def _kind(array: Array) -> str:
    return f"{array.dtype}{list(array.shape)}"

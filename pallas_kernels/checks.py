"""Arguments that an operation cannot take, each refused in one sentence before anything runs."""

import contextlib
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from pallas_kernels.blocks import power_of_two
from pallas_kernels.platform import UnsupportedError, debugging
from pallas_kernels.selection import require_mask
from pallas_kernels.shapes import Array, Bool, Int, UInt32
from pallas_kernels.visibility import Visibility

Named = Mapping[str, tuple[Array, str]]  # an argument's name, and the letters of its axes


def limits(op: str, visibility: Visibility) -> Named:
    """The parts of a visibility, for ``shapes``."""
    if not isinstance(visibility, Visibility):
        raise UnsupportedError(
            f"{op}: visibility is {_kind(visibility)}, and it should be a pallas_kernels.visibility.Visibility"
        )
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
        shape = _shape(op, name, array, axes)
        fits = len(shape) == len(axes) and 0 not in shape
        for axis, size in zip(axes, shape, strict=False):
            fits &= sizes.setdefault(axis, (size, name))[0] == size
        if not fits:
            known += ["none of them 0"] * (0 in shape)
            wanted = ", ".join([f"[{', '.join(axes)}]", *known])
            raise UnsupportedError(f"{op}: {name} is {_kind(array)}, and it should be {wanted}")


def _shape(op: str, name: str, array: Array, axes: list[str]) -> tuple[int, ...]:
    """Of what may be no array at all."""
    if not hasattr(array, "shape"):
        raise UnsupportedError(
            f"{op}: {name} is {_kind(array)}, and it should be an array [{', '.join(axes)}]"
        )
    return array.shape


def attended(
    op: str, arguments: Named, visibility: Visibility, selected: UInt32[Array, "B W S"] | None
) -> None:
    """Raises UnsupportedError unless arguments, limits and the packed mask, if there is one, are of the same tokens."""
    of_tokens = limits(op, visibility)
    masks = {} if selected is None else {"selected": (selected, "B W S")}
    shapes(op, {**arguments, **of_tokens, **masks})
    integers(op, of_tokens)
    if selected is not None:
        require_mask(op, selected, visibility.query_index.shape[1], visibility.key_segment.shape[1])


def floats(op: str, arguments: Mapping[str, Array], *, kernel: bool) -> None:
    """Raises UnsupportedError unless every argument is in bfloat16 or float32; or, where no kernel runs, in float64."""
    for name, array in arguments.items():
        if array.dtype == jnp.float64 and kernel:
            raise UnsupportedError(
                f"{op}: {name} is {_kind(array)}, and kernels compute in float32 at most: cast it to float32, or name "
                "implementation='reference'"
            )
        if array.dtype != jnp.float64:
            short_floats(op, {name: array})


def short_floats(op: str, arguments: Mapping[str, Array]) -> None:
    """Raises UnsupportedError unless every argument is in bfloat16 or float32."""
    for name, array in arguments.items():
        if array.dtype not in (jnp.bfloat16, jnp.float32):
            raise UnsupportedError(
                f"{op}: {name} is {_kind(array)}, and it should be bfloat16 or float32: cast it"
            )


def result_dtype(op: str, dtype: Any) -> jnp.dtype:
    """The dtype of a result; raises UnsupportedError unless it is bfloat16 or float32."""
    with contextlib.suppress(TypeError):  # whatever it is, it is neither
        dtype = jnp.dtype(dtype)
    if dtype not in (jnp.bfloat16, jnp.float32):
        raise UnsupportedError(f"{op}: out_dtype is {dtype}, and it should be bfloat16 or float32")
    return dtype


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
    value = _whole(op, name, number)
    if value < 1:
        raise UnsupportedError(f"{op}: {name} is {value}, and it should be at least 1")
    return value


def factor(op: str, name: str, number: Any) -> float:
    """The number; raises UnsupportedError unless it is finite, and known when the program is made."""
    try:
        finite = math.isfinite(number)
    except TypeError:
        raise UnsupportedError(
            f"{op}: {name} is {_given(number)}, and it should be a number, known when the program is made: give a "
            "float (jax.jit takes it among static_argnames)"
        ) from None
    if not finite:
        raise UnsupportedError(f"{op}: {name} is {number}, and it should be finite")
    return float(number)


def latent_dim_within(op: str, latent_dim: Any, width: int) -> int:
    """The width of the latent; raises UnsupportedError unless it and a rotary part make up a row of that width."""
    value = _whole(op, "latent_dim", latent_dim)
    if not 1 <= value < width:
        raise UnsupportedError(
            f"{op}: latent_dim is {value}, and rows are {width} wide: it should be from 1 to {width - 1}, as a "
            "rotary part follows the latent"
        )
    return value


def _whole(op: str, name: str, number: Any) -> int:
    try:
        return operator.index(number)
    except TypeError:
        raise UnsupportedError(
            f"{op}: {name} is {_given(number)}, and it should be a whole number, known when the program is made: give "
            "an int (jax.jit takes it among static_argnames)"
        ) from None


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
    axes = len(getattr(selection, "shape", ()))
    if axes != 3 or 0 in selection.shape or selection.dtype not in (jnp.int32, jnp.uint32):
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
    wrong, ordered = _outside(indices, 0, keys, distinct=True)

    def sentence(batch: int, query: int, _: int, index: int) -> str:
        what = "twice" if 0 <= index < keys else "where there is no such key"
        return (
            f"{op}: batch {batch}, query {query} of the selection has index {index} {what}: indices are from 0 to "
            f"{keys - 1}, or -1 for an empty place, and each stands once in a row"
        )

    return stop_where(wrong & (ordered != -1), ordered, sentence, indices)


def within(
    op: str,
    name: str,
    numbers: Int[Array, "*R K"],
    least: int,
    end: int,
    *,
    distinct: bool = False,
    nobody: bool = False,
) -> Int[Array, "*R K"]:
    """The numbers; within ``platform.debug()`` only if each is from ``least`` to ``end - 1``, and, where ``distinct``,
    none stands twice in a row. With ``nobody`` they may be ``end`` too, any number of times. Errors as those of
    ``indices_within``.
    """
    if not debugging():
        return numbers
    wrong, ordered = _outside(numbers, least, end, distinct=distinct)
    wrong &= (ordered != end) | (not nobody)

    def sentence(*place_and_number: int) -> str:
        *row, _, number = place_and_number
        twice, once = (" twice", ", each once") if distinct and least <= number < end else ("", "")
        allowed = f"numbers from {least} to {end - 1}{once}" + (f", or {end} for none" if nobody else "")
        return f"{op}: {name}{row} has {number}{twice}, and it should have {allowed}"

    return stop_where(wrong, ordered, sentence, numbers)


def sizes_within(op: str, sizes: Int[Array, "G"], rows: int) -> Int[Array, "G"]:
    """The sizes; within ``platform.debug()`` only if none is negative and their sum is at most ``rows``."""
    if not debugging():
        return sizes
    ends = jnp.cumsum(sizes)

    def sentence(group: int, end: int) -> str:
        return f"{op}: with sizes[{group}] the groups come to {end} rows, and there are {rows}, none of them negative"

    return stop_where((sizes < 0) | (ends > rows), ends, sentence, sizes)


def _outside(numbers: Array, least: int, end: int, *, distinct: bool) -> tuple[Bool[Array, "*R K"], Array]:
    """Which numbers are not from ``least`` to ``end - 1``, or equal to the one before; and they, sorted if distinct."""
    if not distinct:
        return (numbers < least) | (numbers >= end), numbers
    numbers = jnp.sort(numbers, axis=-1)
    before = jnp.concatenate([jnp.full_like(numbers[..., :1], least - 1), numbers[..., :-1]], axis=-1)
    return (numbers < least) | (numbers >= end) | (numbers == before), numbers


def stop_where(
    wrong: Bool[Array, "*P"],
    numbers: Int[Array, "*P"],
    sentence: Callable[..., str],
    result: Int[Array, "..."],
) -> Int[Array, "..."]:
    """The result, if nothing is wrong; else an error with a sentence from the first wrong place and its number.

    What is known raises UnsupportedError; within jax.jit the program stops before it uses the result.
    """
    place = jnp.unravel_index(jnp.argmax(wrong), wrong.shape)
    first = (jnp.any(wrong), *place, jnp.asarray(numbers)[place])

    def refuse(found, *place_and_number):
        if found:
            raise UnsupportedError(sentence(*map(int, place_and_number)))
        return found

    if not any(isinstance(x, Tracer) for x in first):
        refuse(*first)
        return result
    # What comes back is used, so that nothing runs before the answer.
    found = jax.pure_callback(refuse, jax.ShapeDtypeStruct((), bool), *first, vmap_method="sequential")
    return jnp.where(found, -1, result)


def _kind(array: Any) -> str:
    if hasattr(array, "dtype"):
        return f"{array.dtype}{list(array.shape)}"
    return "None" if array is None else f"a {type(array).__name__}"


def _given(number: Any) -> str:
    return _kind(number) if hasattr(number, "dtype") else repr(number)

"""Calls that an operation refuses before anything runs."""

import jax
import pytest

from pallas_kernels.platform import UnsupportedError


def a(dtype, *shape: int) -> jax.ShapeDtypeStruct:
    """An array without numbers."""
    return jax.ShapeDtypeStruct(shape, dtype)


def refused(op, arguments, sentence: str, **options) -> None:
    """With shapes alone: there is nothing that could run."""
    with (
        jax.enable_x64(True),  # else there is no int64
        pytest.raises(UnsupportedError, match=rf"^{op.__name__}: {sentence}"),
    ):
        jax.eval_shape(lambda arrays: op(**arrays, **options), arguments)

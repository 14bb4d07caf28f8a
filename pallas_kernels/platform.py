"""Which implementation of an operation runs."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Literal

import jax
from jax.experimental.pallas import tpu as pltpu

_interpreted = jax.make_user_context(None)


class UnsupportedError(ValueError):
    """A kernel that cannot run here, or cannot take these arguments."""


def interpreted(platform: Literal["tpu", "gpu"]) -> AbstractContextManager:
    """Within this context the kernels of a platform run on any machine, slowly, by interpretation."""
    return _interpreted(platform)


def target() -> str:
    """The platform that programs are traced for: "cpu", "gpu" or "tpu".

    That of the mesh in use, which need not be of this machine, else jax's default.
    """
    if _interpreted.value:
        return _interpreted.value
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return jax.default_backend()
    kind = device.device_kind.lower()
    return next((p for word, p in (("tpu", "tpu"), ("nvidia", "gpu"), ("amd", "gpu")) if word in kind), "cpu")


def tpu_interpreter() -> pltpu.InterpretParams | Literal[False]:
    """What a TPU kernel passes as ``interpret``: the interpreter looks for races between copies and reads."""
    return pltpu.InterpretParams(detect_races=True) if _interpreted.value == "tpu" else False


def gpu_interpreter() -> bool:
    """What a GPU kernel passes as ``interpret``."""
    return _interpreted.value == "gpu"


def choose(op: str, implementation: str | None, available: Mapping[str, Callable]) -> Callable:
    """Returns the implementation of ``op`` that the caller named, or the platform's own.

    ``None`` takes "tpu" on TPUs and "gpu" on GPUs where ``available`` has them, else "reference", which gives
    the same result everywhere. A named implementation runs or fails: nothing else is put in its place.

    Raises UnsupportedError where the named implementation does not exist or is for another platform.
    """
    platform = target()
    if implementation is None:
        return available.get(platform, available["reference"])
    if implementation not in available:
        raise UnsupportedError(
            f"{op} has no implementation {implementation!r}: use one of {sorted(available)}, or None to let the "
            "platform choose"
        )
    if implementation not in ("reference", platform):
        raise UnsupportedError(
            f"{op}: the implementation {implementation!r} does not run on {platform}: use None to let the platform "
            f"choose, or pallas_kernels.platform.interpreted({implementation!r}) to try it out"
        )
    return available[implementation]

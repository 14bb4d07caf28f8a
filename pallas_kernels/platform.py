"""Which implementation of an operation runs."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Literal

import jax
from jax.experimental.pallas import tpu as pltpu

_interpreted = jax.make_user_context((None, False))  # platform, whether races are looked for
_debugging = jax.make_user_context(False)


class UnsupportedError(ValueError):
    """A kernel that cannot run here, or cannot take these arguments."""


def interpreted(platform: Literal["tpu", "gpu"], *, detect_races: bool = False) -> AbstractContextManager:
    """Within this context the kernels of a platform run on any machine, slowly, by interpretation.

    Where ``detect_races``, the TPU's interpreter looks for copies that nobody waited for; ten times as slow.
    """
    return _interpreted((platform, detect_races))


def debug() -> AbstractContextManager:
    """Within this context an index that is no key, or stands twice, stops the program with a sentence that names it.

    For programs made within it; the check costs a sort of every list of indices and a call of the host.
    """
    return _debugging(True)


def debugging() -> bool:
    """Whether it is on."""
    return _debugging.value


def target() -> str:
    """The platform that programs are traced for: "cpu", "gpu" or "tpu".

    That of the mesh in use, which need not be of this machine, else jax's default.
    """
    platform, _ = _interpreted.value
    if platform:
        return platform
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return jax.default_backend()
    kind = device.device_kind.lower()
    return next((p for word, p in (("tpu", "tpu"), ("nvidia", "gpu"), ("amd", "gpu")) if word in kind), "cpu")


def tpu_interpreter() -> pltpu.InterpretParams | Literal[False]:
    """What a TPU kernel passes as ``interpret``."""
    platform, detect_races = _interpreted.value
    return pltpu.InterpretParams(detect_races=detect_races) if platform == "tpu" else False


def tpu_cores() -> int:
    """Cores that work as one device: two on v4 and v5p, where kernels that accumulate need an accumulator for each."""
    return 1 if tpu_interpreter() else pltpu.get_tpu_info().num_cores


def tpu_multiplies(dtype) -> bool:
    """Whether the matrix unit takes two operands of this dtype as they are."""
    return not tpu_interpreter() and pltpu.get_tpu_info().is_matmul_supported(dtype, dtype)


def gpu_interpreter() -> bool:
    """What a GPU kernel passes as ``interpret``."""
    return _interpreted.value[0] == "gpu"


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

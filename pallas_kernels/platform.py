"""Which implementation of an operation runs."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Literal, NamedTuple

import jax
from jax.experimental.pallas import tpu as pltpu


class _Interpreted(NamedTuple):
    platform: str | None = None
    detect_races: bool = False
    cores: int = 1


_HOPPER = ("H100", "H200", "H800", "H20", "GH200")
_SMALL_TPUS = ("TPU v2", "TPU v3", "TPU v4")
_interpreted = jax.make_user_context(_Interpreted())
_debugging = jax.make_user_context(False)


class UnsupportedError(ValueError):
    """A kernel that cannot run here, or cannot take these arguments."""


def interpreted(
    platform: Literal["tpu", "gpu"], *, detect_races: bool = False, cores: int = 1
) -> AbstractContextManager:
    """Within this context the kernels of a platform run on any machine, slowly, by interpretation.

    Where ``detect_races``, the TPU's interpreter looks for copies that nobody waited for; ten times as slow. With
    ``cores=2`` kernels are made as for a v5p, whose two cores work as one device.
    """
    return _interpreted(_Interpreted(platform, detect_races, cores))


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
    if _interpreted.value.platform:
        return _interpreted.value.platform
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return jax.default_backend()
    kind = device.device_kind.lower()
    return next((p for word, p in (("tpu", "tpu"), ("nvidia", "gpu"), ("amd", "gpu")) if word in kind), "cpu")


def _lack(platform: str) -> str:
    """Why kernels of the platform do not run on this device of it; "" if they do."""
    if _interpreted.value.platform or platform == "cpu":
        return ""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    kind = device.device_kind
    if platform == "gpu" and not any(name in kind for name in _HOPPER):
        return f"its kernels are made for Hopper GPUs ({', '.join(_HOPPER)}), and this is {kind}"
    if platform == "tpu" and any(kind.startswith(name) for name in _SMALL_TPUS):
        return f"its kernels need more VMEM than {kind} has: TPU v5e or later"
    return ""


def tpu_interpreter() -> pltpu.InterpretParams | Literal[False]:
    """What a TPU kernel passes as ``interpret``."""
    platform, detect_races, _ = _interpreted.value
    return pltpu.InterpretParams(detect_races=detect_races) if platform == "tpu" else False


def tpu_cores() -> int:
    """Cores that work as one device: two on v4 and v5p, where kernels that accumulate need an accumulator for each."""
    return _interpreted.value.cores if tpu_interpreter() else pltpu.get_tpu_info().num_cores


def tpu_multiplies(dtype) -> bool:
    """Whether the matrix unit takes two operands of this dtype as they are."""
    return not tpu_interpreter() and pltpu.get_tpu_info().is_matmul_supported(dtype, dtype)


def gpu_interpreter() -> bool:
    """What a GPU kernel passes as ``interpret``."""
    return _interpreted.value.platform == "gpu"


def choose(op: str, implementation: str | None, available: Mapping[str, Callable]) -> Callable:
    """Returns the implementation of ``op`` that the caller named, or the platform's own.

    ``None`` takes "tpu" on TPUs (v5e or later) and "gpu" on GPUs (Hopper) where ``available`` has them, else
    "reference", which gives the same result everywhere. A named implementation runs or fails: nothing else is put in
    its place.

    Raises UnsupportedError where the named implementation does not exist or is for another device.
    """
    platform = target()
    if implementation is None:
        return available[platform if platform in available and not _lack(platform) else "reference"]
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
    if implementation != "reference" and (lack := _lack(platform)):
        raise UnsupportedError(
            f"{op}: the implementation {implementation!r} does not run here: {lack}; use None"
        )
    return available[implementation]

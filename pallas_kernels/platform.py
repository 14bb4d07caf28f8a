"""Which implementation of an operation runs."""

from collections.abc import Callable, Mapping

import jax


def choose(op: str, implementation: str | None, available: Mapping[str, Callable]) -> Callable:
    """Returns the implementation of ``op`` that the caller named, or the platform's own.

    ``None`` takes "tpu" on TPUs and "gpu" on GPUs where ``available`` has them, else "reference", which gives
    the same result everywhere. A named implementation runs or fails: nothing else is put in its place.

    Raises ValueError where the named implementation does not exist for this operation.
    """
    if implementation is None:
        return available.get(jax.default_backend(), available["reference"])
    if implementation not in available:
        raise ValueError(
            f"{op} has no implementation {implementation!r}: use one of {sorted(available)}, or None to let the "
            "platform choose"
        )
    return available[implementation]

"""Tokens a second, and the share of the devices' peak that they come to (MFU)."""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Dense bfloat16 FLOP/s of one JAX device, by the beginning of its device_kind; NVIDIA's data sheets print
# twice as much, "with sparsity". More precise names come first.
_BFLOAT16_PEAK = {
    # Source: the "Peak compute per chip" rows of cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}. A chip is
    # one device, but for TPU7x, whose two chiplets are a device each.
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,
    # Source: the data sheets of the A100 (312), H100 (SXM 1,979/2, PCIe 1,513/2, NVL 1,671/2), H200 (SXM
    # 1,979/2, NVL 1,671/2) and HGX B200 (4,500/2 a GPU); the H100 white paper gives 989.4 for SXM.
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756.5e12,
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H100": 989.4e12,
    "NVIDIA H200 NVL": 835.5e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA B200": 2250e12,
}
_MEASURE_SECONDS = 0.4
_LARGEST_SIDE = 8192


class Peak(NamedTuple):
    """FLOP/s of one device, and whether they were measured here or are the maker's."""

    flops_per_second: float
    measured: bool


def peak_flops(device: Any) -> Peak:
    """A ``jax.Device``'s dense bfloat16 peak where it is known, else what a float32 matrix product reaches.

    Measuring takes about a second, once a process. Virtual CPU devices share the cores, and the peak.
    """
    known = _known_peak(device.device_kind)
    if known:
        return Peak(known, measured=False)
    share = jax.local_device_count("cpu") if device.platform == "cpu" else 1
    return Peak(_measured_peak(device) / share, measured=True)


def _known_peak(device_kind: str) -> float:
    """From the table; 0 for what is not in it, and for a slice of a GPU (MIG)."""
    if "MIG" in device_kind or "TPU v4 lite" in device_kind:
        return 0.0
    return next((peak for name, peak in _BFLOAT16_PEAK.items() if device_kind.startswith(name)), 0.0)


@functools.cache
def _measured_peak(device: Any) -> float:
    """The best of repeated products, of a size that keeps the device busy for some milliseconds."""
    product = jax.jit(jnp.matmul)

    def seconds(matrix: jax.Array) -> float:
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        return time.perf_counter() - start

    side = 1024
    while True:
        matrix = jax.device_put(jnp.ones((side, side), jnp.float32), device)
        seconds(matrix)  # compiles
        best = seconds(matrix)
        if best > 0.01 or side >= _LARGEST_SIDE:
            break
        side *= 2
    end = time.perf_counter() + _MEASURE_SECONDS
    while time.perf_counter() < end:
        best = min(best, seconds(matrix))
    return 2 * side**3 / best


class Window(NamedTuple):
    """How fast it went since the window before."""

    tokens_per_second: float
    mfu: float


class Throughput:
    """Turns tokens into tokens a second and MFU, a window at a time.

    ``mfu = tokens · flops_per_token / (seconds · peak_flops)``, with the FLOPs of the model, not of what is
    computed again, and the peak of all devices together. JAX returns before the devices are done: fetch a
    result of the last step before ``window``.
    """

    def __init__(
        self, *, flops_per_token: float, peak_flops: float, clock: Callable[[], float] = time.perf_counter
    ):
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._clock = clock
        self._start = clock()

    def window(self, tokens: int) -> Window:
        """The speed at which ``tokens`` went through since the last call, and a new window."""
        now = self._clock()
        seconds, self._start = now - self._start, now
        tokens_per_second = tokens / seconds
        return Window(tokens_per_second, tokens_per_second * self._flops_per_token / self._peak_flops)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here does not count: compiling, evaluating, saving."""
        start = self._clock()
        try:
            yield
        finally:
            self._start += self._clock() - start

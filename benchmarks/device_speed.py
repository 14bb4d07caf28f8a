"""How fast a device is: what its maker says, what it was seen to reach, and how long a program takes on it."""

import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

E4M3 = jnp.float8_e4m3fn
_ROUND_SECONDS = (
    0.01  # of calls that wait for one another only, so that starting them is not what is measured
)
_MOST_CALLS = 64  # of a round


class Chip(NamedTuple):
    """A maker's dense peaks, FLOP/s of one JAX device; what it has no arithmetic for runs as bfloat16."""

    name: str
    bf16: float
    e4m3: float


# By the beginning of device_kind; more precise names come first. TPU7x: two chiplets are a device each.
# Source: the "Peak compute per chip" rows of cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}; NVIDIA's data sheets,
# which print twice as much, "with sparsity".
_CHIPS = {
    "TPU v4": Chip("v4", 275e12, 275e12),
    "TPU v5 lite": Chip("v5e", 197e12, 197e12),
    "TPU v5e": Chip("v5e", 197e12, 197e12),
    "TPU v5": Chip("v5p", 459e12, 459e12),
    "TPU v6": Chip("v6e", 918e12, 918e12),
    "TPU7x": Chip("tpu7x", 2307e12 / 2, 4614e12 / 2),
    "NVIDIA A100": Chip("a100", 312e12, 312e12),
    "NVIDIA H100 PCIe": Chip("h100-pcie", 756.5e12, 1513e12),
    "NVIDIA H100 NVL": Chip("h100-nvl", 835.5e12, 1671e12),
    "NVIDIA H100": Chip("h100", 989.4e12, 1979e12),
    "NVIDIA H200 NVL": Chip("h200-nvl", 835.5e12, 1671e12),
    "NVIDIA H200": Chip("h100", 989.4e12, 1979e12),
    "NVIDIA B200": Chip("b200", 2250e12, 4500e12),
}


class Times(NamedTuple):
    """Seconds of a call: the middle and the least of the rounds, and how many there were."""

    median: float
    least: float
    rounds: int


class Ceilings(NamedTuple):
    """What the device reached: FLOP/s of large products of two operands of a dtype, bytes/s of a large copy."""

    flops: dict[str, float]
    copy: float

    def of(self, dtype: str) -> float | None:
        """FLOP/s for operands of "bf16" or "e4m3", which may run as bfloat16, as on CPU both may as float32.

        None if no such product was measured.
        """
        ways = ("f32", "bf16", "e4m3") if dtype == "e4m3" else ("f32", "bf16")
        return max((self.flops[way] for way in ways if way in self.flops), default=None)


def chip_of(device: Any) -> Chip | None:
    """None for what is not in the table, and for a slice of a GPU (MIG)."""
    if "MIG" in device.device_kind or "TPU v4 lite" in device.device_kind:
        return None
    return next((chip for name, chip in _CHIPS.items() if device.device_kind.startswith(name)), None)


def time_calls(calls: list[Callable[[], Any]], *, rounds: int, seconds: float) -> Times:
    """Times the calls in turn, after one of each; at least so many rounds, and so many seconds of them.

    Calls of a round are started without waiting for the one before, and their results dropped at once: a round's
    time is shared among them.
    """
    for call in calls:
        jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(calls[0]())
    each = time.perf_counter() - start
    of_round = min(_MOST_CALLS, max(1, round(_ROUND_SECONDS / max(each, 1e-9))))
    number, times, end = 0, [], time.perf_counter() + seconds
    while len(times) < rounds or time.perf_counter() < end:
        start, result = time.perf_counter(), None
        for _ in range(of_round):
            result = calls[number % len(calls)]()
            number += 1
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / of_round)
    return Times(float(np.median(times)), min(times), len(times))


def measure_ceilings(side: int, copied_bytes: int, *, rounds: int, seconds: float) -> Ceilings:
    """Products of matrices of ``side`` in the dtypes that the platform multiplies, and a copy of so many bytes.

    A copy reads and writes: twice the bytes count.
    """
    on_cpu = jax.default_backend() == "cpu"
    dtypes = {"f32": jnp.float32, "bf16": jnp.bfloat16} if on_cpu else {"bf16": jnp.bfloat16, "e4m3": E4M3}
    flops = {}
    for name, dtype in dtypes.items():
        try:
            flops[name] = 2 * side**3 / _time_product(side, dtype, rounds, seconds).median
        except Exception as error:  # whatever a compiler or a device raises: this ceiling stays unknown
            print(f"{name} product: {str(error).splitlines()[0]}", file=sys.stderr)
    words = jnp.zeros(copied_bytes // 4, jnp.int32)
    copy = jax.jit(lambda x: x + 1)
    copying = time_calls([lambda: copy(words)], rounds=rounds, seconds=seconds)
    return Ceilings(flops, 2 * words.nbytes / copying.median)


def _time_product(side: int, dtype, rounds: int, seconds: float) -> Times:
    """Of [side, side] and the transpose of another, which is how GPUs multiply e4m3; rounded to bfloat16."""
    out = jnp.float32 if dtype == jnp.float32 else jnp.bfloat16
    x = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16).astype(dtype)

    @jax.jit
    def product(x, y):
        # Promised in float32, which is what tensor cores add in.
        total = jax.lax.dot_general(x, y, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        return total.astype(out)

    return time_calls([lambda: product(x, x)], rounds=rounds, seconds=seconds)

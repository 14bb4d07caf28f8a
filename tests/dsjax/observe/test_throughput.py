"""The table of peaks, the measured one, and the arithmetic of a window."""

import contextlib
from types import SimpleNamespace

import jax
import pytest

from dsjax.observe.throughput import Throughput, peak_flops


@pytest.mark.parametrize(
    ("device_kind", "teraflops"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA B200", 2250),
    ],
)
def test_the_peak_of_a_known_device(device_kind, teraflops):
    peak = peak_flops(SimpleNamespace(device_kind=device_kind))
    assert peak == (pytest.approx(teraflops * 1e12), False)


@pytest.mark.parametrize("device_kind", ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "TPU v4 lite", "cpu"])
def test_a_device_not_in_the_table_is_measured(device_kind, monkeypatch):
    monkeypatch.setattr("dsjax.observe.throughput._measured_peak", lambda device: 3e9)
    device = SimpleNamespace(device_kind=device_kind, platform="gpu")
    assert peak_flops(device) == (3e9, True)


def test_measuring_here():
    peak = peak_flops(jax.devices("cpu")[0])
    assert peak.measured
    assert 1e9 < peak.flops_per_second < 1e14
    assert peak_flops(jax.devices("cpu")[0]) == peak, "measured once"


class Clock:
    """A clock that the test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_window_reaches_back_to_the_one_before():
    clock = Clock()
    throughput = Throughput(flops_per_token=6e6, peak_flops=12e9, clock=clock)
    clock.now += 4
    assert throughput.window(2000) == (500, 0.25)
    clock.now += 1
    assert throughput.window(1000) == (1000, 0.5)


def test_a_pause_does_not_count_even_if_it_fails():
    clock = Clock()
    throughput = Throughput(flops_per_token=1, peak_flops=1, clock=clock)
    clock.now += 1
    with contextlib.suppress(KeyError), throughput.paused():
        clock.now += 50
        raise KeyError
    clock.now += 1
    assert throughput.window(10).tokens_per_second == 5

"""Timing several programs fairly on one noisy machine: in turn, medians and ratios."""

import time
from collections.abc import Callable

import numpy as np


def alternate(
    programs: dict[str, Callable[[], object]], *, rounds: int, warmup: int = 1
) -> dict[str, np.ndarray]:
    """Seconds of each program in each round; all run in every round, one after the other."""
    seconds = {name: [] for name in programs}
    for number in range(warmup + rounds):
        for name, run in programs.items():
            start = time.perf_counter()
            run()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def ratio(slow: np.ndarray, fast: np.ndarray) -> float:
    """Median over the rounds of how many times faster ``fast`` was."""
    return float(np.median(slow / fast))

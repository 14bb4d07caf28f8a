"""How the tests compile and compare: by relative error, and gradients by float64 differences."""

from collections.abc import Callable, Sequence

import jax
import numpy as np


def quick_jit(function: Callable, **how):
    """``jax.jit`` with less machine-code tuning on CPU, as compiling is most of a test's time."""
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(function, compiler_options=quick, **how)


def relative(a, b) -> float:
    """``‖a - b‖ / ‖b‖`` in float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def cosine_difference(a, b) -> float:
    """``1 - 2⟨a, b⟩ / (‖a‖² + ‖b‖²)`` in float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(1 - 2 * np.sum(a * b) / (np.sum(a * a) + np.sum(b * b)))


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def slope(function: Callable[..., float], arguments: Sequence[np.ndarray], which: int, direction) -> float:
    """Derivative of a float64 function along a direction of one of its arguments, by central difference."""
    arguments = [np.asarray(argument, np.float64) for argument in arguments]
    step = 1e-6 * direction
    ahead, behind = list(arguments), list(arguments)
    ahead[which], behind[which] = arguments[which] + step, arguments[which] - step
    return (function(*ahead) - function(*behind)) / 2e-6


def assert_gradients(gradients: Sequence, function: Callable[..., float], arguments: Sequence[np.ndarray]):
    """Each gradient, along three random directions, is the slope of the float64 function."""
    for which, gradient in enumerate(gradients):
        gradient = np.asarray(gradient, np.float64)
        assert gradient.shape == arguments[which].shape
        for seed in range(3):
            direction = np.random.RandomState(100 + seed).standard_normal(gradient.shape)
            expected = slope(function, arguments, which, direction)
            # The rounding of the gradient's elements adds up along the direction.
            rounding = 1e-5 * np.linalg.norm(gradient)
            np.testing.assert_allclose(np.sum(gradient * direction), expected, rtol=1e-4, atol=rounding)

"""Quantisation to e4m3 with power-of-two scales, bit for bit against the number format's definition."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from e4m3 import VALUES, dequantised, quantised
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.precision.act_quant import act_quant, fake_quant, power_of_two_at_least
from dsjax.precision.hadamard import hadamard_matrix, rotate

jitted = jax.jit(act_quant, static_argnames="group_size")


def check(x: np.ndarray, function=jitted) -> None:
    y, scale = function(jnp.asarray(x))
    expected, expected_scale = quantised(np.asarray(x, np.float32))
    assert y.dtype == jnp.float8_e4m3fn
    np.testing.assert_array_equal(scale, expected_scale.astype(np.float32))
    np.testing.assert_array_equal(np.asarray(y).view(np.uint8), expected)


@pytest.mark.parametrize("function", [act_quant, jitted], ids=["eager", "jit"])
def test_random_values_of_all_magnitudes(function):
    random = np.random.RandomState(0)
    rows = random.standard_normal((300, 256)) * 10.0 ** random.uniform(-6, 6, (300, 1))
    check(rows.astype(np.float32), function)


@pytest.mark.parametrize("function", [act_quant, jitted], ids=["eager", "jit"])
def test_a_largest_value_at_the_end_of_the_format_keeps_its_scale(function):
    """448·2^n divides to a power of two exactly; its neighbours fall on either side."""
    ends = np.float32(448) * np.float32(2.0) ** np.arange(-22, 40, dtype=np.float32)
    largest = np.concatenate(
        [ends, np.nextafter(ends, np.float32(np.inf)), np.nextafter(ends, np.float32(0))]
    )
    x = np.random.RandomState(0).uniform(-1, 1, (largest.size, 32)).astype(np.float32) * largest[:, None]
    x[:, 5] = largest * np.where(np.arange(largest.size) % 2, 1, -1)
    check(x, function)


def test_every_tie_goes_to_the_even_mantissa():
    midpoints = (VALUES[:-1] + VALUES[1:]) / 2
    x = np.zeros((4, 128), np.float32)
    x[0, : midpoints.size] = midpoints
    x[1] = -x[0]
    x[2] = np.nextafter(x[0], np.float32(np.inf))
    x[3] = np.nextafter(x[0], np.float32(-np.inf))
    x[:, -1] = 448  # the scale is 1
    check(x)


def test_tiny_and_zero_groups():
    x = np.zeros((4, 256), np.float32)
    x[1] = 1e-6
    x[2, 3] = np.float32(1e-4)
    x[3, ::2] = -0.0
    check(x)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-(2.0**90), 2.0**90, width=32), min_size=16, max_size=16))
def test_any_values(row):
    check(np.array([row], np.float32))


@settings(deadline=None, max_examples=200)
@given(st.floats(min_value=2.0**-126, max_value=2.0**126, width=32))
def test_the_power_of_two_is_the_smallest_that_is_not_below(x):
    power = float(power_of_two_at_least(jnp.float32(x)))
    assert math.frexp(power)[0] == 0.5
    assert power >= x > power / 2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_fake_quant_gives_the_quantised_values_and_lets_the_gradient_through(dtype):
    x = jnp.asarray(np.random.RandomState(0).standard_normal((50, 256)) ** 5, dtype)
    restored = dequantised(*quantised(np.asarray(x, np.float32)))
    result, gradient_of = jax.jit(lambda x: jax.vjp(fake_quant, x))(x)
    assert result.dtype == dtype
    np.testing.assert_array_equal(np.asarray(result, np.float64), restored)
    cotangent = jnp.asarray(np.random.RandomState(1).standard_normal((50, 256)), dtype)
    np.testing.assert_array_equal(gradient_of(cotangent)[0], cotangent)


def test_the_hadamard_matrix_follows_sylvesters_recursion():
    matrix = np.ones((1, 1))
    while len(matrix) < 128:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    np.testing.assert_array_equal(hadamard_matrix(128), matrix)
    with pytest.raises(ValueError, match="96 needs a power of two"):
        hadamard_matrix(96)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 5e-7), (jnp.bfloat16, 3e-3)])
def test_rotation_preserves_dot_products(dtype, tolerance):
    x, y = (jnp.asarray(np.random.RandomState(s).standard_normal((20, 128)), dtype) for s in (0, 1))
    rotated = [np.asarray(rotate(a), np.float64) for a in (x, y)]
    expected = np.asarray(x, np.float64) @ hadamard_matrix(128) / 128**0.5
    assert np.linalg.norm(rotated[0] - expected) < tolerance * np.linalg.norm(expected)
    dots = np.asarray(x, np.float64) @ np.asarray(y, np.float64).T
    assert np.linalg.norm(rotated[0] @ rotated[1].T - dots) < 2 * tolerance * np.linalg.norm(dots)

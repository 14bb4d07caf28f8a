"""RMSNorm and LayerNorm against their formulas in float64.

Without jit, which may leave out a rounding that the program asks for; the tolerance of bfloat16 is the rounding
of the result alone.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from numerics import relative

from dsjax.models.norms import LayerNorm, RMSNorm

DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 3e-7), (jnp.bfloat16, 1.8e-3)])
SCALES = pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
WIDTH = 96


def rows(scale: float, dtype, offset: float = 0.0):
    x = offset + scale * np.random.RandomState(0).standard_normal((4, 7, WIDTH))
    return jnp.asarray(x, dtype)


def random_weight() -> np.ndarray:
    return np.random.RandomState(1).standard_normal(WIDTH).astype(np.float32)


@DTYPES
@SCALES
def test_rms_norm(scale, dtype, tolerance):
    norm = RMSNorm(WIDTH, eps=1e-6)
    norm.weight[...] = jnp.asarray(random_weight())
    x = rows(scale, dtype)
    y = norm(x)
    x64 = np.asarray(x, np.float64)
    expected = random_weight() * x64 / np.sqrt(np.mean(x64**2, axis=-1, keepdims=True) + 1e-6)
    assert y.dtype == dtype
    assert relative(y, expected) < tolerance


@DTYPES
@SCALES
def test_layer_norm(scale, dtype, tolerance):
    _check_layer_norm(rows(scale, dtype), tolerance)


def test_layer_norm_far_from_zero():
    """``mean(x²) - mean(x)²`` would keep no digit of this variance."""
    _check_layer_norm(rows(1.0, jnp.float32, offset=1e4), 1e-3)


def _check_layer_norm(x, tolerance):
    norm = LayerNorm(WIDTH, eps=1e-6, axis="index_head_dim")
    bias = np.random.RandomState(2).standard_normal(WIDTH).astype(np.float32)
    norm.weight[...] = jnp.asarray(random_weight())
    norm.bias[...] = jnp.asarray(bias)
    y = norm(x)
    x64 = np.asarray(x, np.float64)
    centred = x64 - x64.mean(axis=-1, keepdims=True)
    expected = random_weight() * centred / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + 1e-6) + bias
    assert y.dtype == x.dtype
    assert relative(y, expected) < tolerance


def test_parameters_stay_float32():
    """Checkpoints keep norms in float32, whatever the precision of the other weights."""
    layer, rms = LayerNorm(8, eps=1e-6, axis="index_head_dim"), RMSNorm(8, eps=1e-6)
    assert {layer.weight.dtype, layer.bias.dtype, rms.weight.dtype} == {jnp.dtype("float32")}

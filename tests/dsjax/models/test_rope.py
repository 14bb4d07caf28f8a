"""Rotary embedding against its formula in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import quick_jit, relative
from small_model import small_config

from dsjax.config import presets
from dsjax.models.rope import frequencies, rope_at, rotate_half, rotate_interleaved

RELEASED = presets.deepseek_v32_671b()
FOUR_K = small_config(qk_rope_head_dim=64, index_head_dim=64, max_position_embeddings=4096)
POSITIONS = np.array([[0, 1, 2, 63, 4095, 4096, 65_537, 131_071, 163_838, 163_839]])


def plain_frequencies(dim: int) -> np.ndarray:
    return np.array([10_000.0 ** (-2 * i / dim) for i in range(dim // 2)])


def yarn_frequencies(dim: int, low: int, high: int) -> np.ndarray:
    """``(f/40)(1 - smooth) + f·smooth``, pair by pair."""
    result = []
    for i, f in enumerate(plain_frequencies(dim)):
        smooth = 1 - min(max((i - low) / (high - low), 0), 1)
        result.append(f / 40 * (1 - smooth) + f * smooth)
    return np.array(result)


def test_the_limits_of_the_blend_are_those_of_the_report():
    def corr(rotations):
        return 64 * math.log(4096 / (2 * math.pi * rotations)) / (2 * math.log(10_000))

    assert (math.floor(corr(32)), math.ceil(corr(1))) == (10, 23)
    ratio = frequencies(RELEASED).astype(np.float64) / plain_frequencies(64)
    np.testing.assert_allclose(ratio[:11], 1, rtol=1e-7)
    assert np.all((ratio[11:23] < 0.999) & (ratio[11:23] > 0.026))
    np.testing.assert_allclose(ratio[23:], 1 / 40, rtol=1e-7)


def test_frequencies():
    np.testing.assert_allclose(frequencies(RELEASED), yarn_frequencies(64, 10, 23), rtol=1e-7)
    np.testing.assert_allclose(frequencies(FOUR_K), plain_frequencies(64), rtol=1e-7)


@pytest.mark.parametrize(("length", "scale"), [(4096, 192**-0.5), (4097, 0.1352338), (163840, 0.1352338)])
def test_yarn_and_its_softmax_factor_begin_beyond_the_original_length(length, scale):
    config = small_config(
        qk_nope_head_dim=128, qk_rope_head_dim=64, index_head_dim=64, max_position_embeddings=length
    )
    assert config.softmax_scale == pytest.approx(scale, rel=1e-6)
    stretched = not np.allclose(frequencies(config), plain_frequencies(64), rtol=1e-6)
    assert stretched == (length > 4096)


@pytest.mark.parametrize("config", [RELEASED, FOUR_K], ids=["yarn", "plain"])
def test_angles_are_those_of_the_released_code_and_near_the_true_ones(config):
    """The released code multiplies float32 positions by float32 frequencies, and so do we.

    That is exact to half a unit in the last place of the angle, 0.008 at the longest context; cosine and sine
    of that angle are exact.
    """
    rope = quick_jit(lambda positions: rope_at(positions, config))(POSITIONS)
    rounded = (POSITIONS[..., None].astype(np.float32) * frequencies(config)).astype(np.float64)
    np.testing.assert_allclose(rope.cos, np.cos(rounded), atol=2e-7)
    np.testing.assert_allclose(rope.sin, np.sin(rounded), atol=2e-7)
    true = yarn_frequencies(64, 10, 23) if config is RELEASED else plain_frequencies(64)
    angles = POSITIONS[..., None] * true
    worst = angles * 2.0**-23 + 2e-7  # one rounding of the frequency, one of the product
    assert np.all(np.abs(rope.cos - np.cos(angles)) <= worst)
    assert np.all(np.abs(rope.sin - np.sin(angles)) <= worst)


def rotated_pairs(x: np.ndarray, angles: np.ndarray, pairs: list[tuple[int, int]]) -> np.ndarray:
    """The pair (a, b) turned by its angle, both staying where they are; x [T, H, R], angles [T, R/2]."""
    result = np.full(x.shape, np.nan)
    for i, (first, second) in enumerate(pairs):
        a, b, angle = x[..., first], x[..., second], angles[:, None, i]
        result[..., first] = a * np.cos(angle) - b * np.sin(angle)
        result[..., second] = a * np.sin(angle) + b * np.cos(angle)
    return result


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("rotate", "pairs"),
    [
        (rotate_interleaved, [(2 * i, 2 * i + 1) for i in range(32)]),
        (rotate_half, [(i, i + 32) for i in range(32)]),
    ],
    ids=["interleaved", "half"],
)
def test_rotation(rotate, pairs, dtype):
    x = jnp.asarray(np.random.RandomState(0).standard_normal((1, POSITIONS.size, 3, 64)), dtype)
    rope = rope_at(jnp.asarray(POSITIONS), RELEASED)
    angles = (POSITIONS[0][:, None].astype(np.float32) * frequencies(RELEASED)).astype(np.float64)
    expected = rotated_pairs(np.asarray(x[0], np.float64), angles, pairs)
    turned = quick_jit(rotate)(x, rope)
    assert turned.dtype == dtype
    assert relative(turned[0], expected) < (3e-7 if dtype == jnp.float32 else 3e-3)
    # A shared key has no axis of heads.
    np.testing.assert_array_equal(quick_jit(rotate)(x[:, :, 1], rope), turned[:, :, 1])


def test_every_sequence_of_a_batch_has_its_own_positions():
    positions = jnp.stack([jnp.arange(5), jnp.arange(5) + 100])
    both = rope_at(positions, RELEASED)
    second = rope_at(positions[1:], RELEASED)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1:], b), both, second)
    assert relative(both.cos[0], both.cos[1]) > 0.1

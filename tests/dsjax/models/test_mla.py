"""Multi-head latent attention and the indexer's loss against the reports' formulas, written out in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import quick_jit, relative
from small_model import random_model, small_config, variables
from transcription import AttentionTranscription, IndexerTranscription, float64, softmax

from dsjax.models.rope import rope_at
from dsjax.models.stack import layer_at
from pallas_kernels.platform import interpreted

LENGTH = 230
SEGMENTS = np.repeat([1, 2, 0], [50, 160, 20])[None].astype(np.int32)
POSITIONS = 5000 + np.arange(LENGTH, dtype=np.int32)[None]
X = np.random.RandomState(0).standard_normal((1, LENGTH, 128)).astype(np.float32)
CASES = {
    # 64 of up to 160 keys, five blocks
    "mha": {"dense_attention_max_length": LENGTH, "attention_block_size": 48},
    "mqa": {"dense_attention_max_length": 64, "attention_block_size": 48},
    # all keys: the warm-up of the indexer
    "mha, all keys": {"dense_attention_max_length": LENGTH, "index_topk": LENGTH},
    "mqa, all keys": {"dense_attention_max_length": 64, "index_topk": LENGTH},
    "mha without YaRN": {"dense_attention_max_length": LENGTH, "max_position_embeddings": 4096},
    "v3": {"index_topk": 0},
}
WITH_INDEXER = [case for case in CASES if case != "v3"]


@functools.cache
def attention(case: str):
    config = small_config(**{"max_position_embeddings": 163840, "attention_block_size": 120} | CASES[case])
    return layer_at(random_model(config).moe_layers, 1).self_attn


@functools.partial(quick_jit, static_argnames="with_indexer_loss")
def run(attn, x, segment_ids, *, with_indexer_loss: bool = False):
    return attn(x, rope_at(POSITIONS, attn.config), segment_ids, with_indexer_loss=with_indexer_loss)


@quick_jit
def selected(attn, x, segment_ids):
    return attn.selected(x, rope_at(POSITIONS, attn.config), segment_ids)


@functools.cache
def attended(case: str) -> np.ndarray:
    """What every token attends to, [T, S]: what ``selected`` says, which test_indexer.py holds to the scores."""
    indices = np.asarray(selected(attention(case), X, SEGMENTS)[0])
    mask = np.zeros((LENGTH, LENGTH + 1), bool)
    np.put_along_axis(mask, indices, True, axis=-1)
    return mask[:, :LENGTH]


@functools.cache
def transcribed(case: str) -> AttentionTranscription:
    return AttentionTranscription(attention(case), X[0].astype(np.float64), POSITIONS[0], attended(case))


def test_the_cases_are_as_sparse_as_they_say():
    visible = (SEGMENTS[0] == SEGMENTS[0][:, None]) & np.tri(LENGTH, dtype=bool) & (SEGMENTS[0] != 0)
    for case, changes in CASES.items():
        expected = np.minimum(visible.sum(-1), changes.get("index_topk", 64) or LENGTH)
        np.testing.assert_array_equal(attended(case).sum(-1), expected)
        assert not np.any(attended(case) & ~visible)


@pytest.mark.parametrize("case", CASES)
def test_output_and_cache(case):
    u, kl, latents = run(attention(case), X, SEGMENTS)
    expected = transcribed(case)
    assert relative(u[0], expected.u) < 3e-6
    assert relative(latents.c[0], expected.c) < 1e-6
    assert relative(latents.k_pe[0], expected.k_pe) < 1e-6  # pairs in place: a cache others can read
    assert (latents.index_key is None) == (case == "v3")
    assert not np.any(kl)
    assert not np.any(u[0, SEGMENTS[0] == 0])  # padding attends to nothing


def indexer_parameters(attn) -> dict[str, np.ndarray]:
    return {path: float64(variable) for path, variable in variables(attn.indexer)}


def kl_by_hand(case: str, parameters: dict[str, np.ndarray]) -> np.ndarray:
    """``KL(p_t ‖ softmax(I_t))`` on the attended set, p being the mean of the heads' probabilities; [T]."""
    mask, attention_part = attended(case), transcribed(case)
    config = attention(case).config
    scores = IndexerTranscription(
        config, parameters, X[0].astype(np.float64), attention_part.q_latent, POSITIONS[0]
    ).scores
    p, q = attention_part.p.mean(0), softmax(scores, mask)
    ratio = np.where(mask, p, 1) / np.where(mask, q, 1)
    return np.sum(np.where(mask, p * np.log(ratio), 0), axis=-1)


@pytest.mark.parametrize("case", WITH_INDEXER)
def test_indexer_loss(case):
    u, kl, _ = run(attention(case), X, SEGMENTS, with_indexer_loss=True)
    expected = kl_by_hand(case, indexer_parameters(attention(case)))
    assert kl.dtype == jnp.float32
    assert relative(kl[0], expected) < 1e-4  # a small difference of large terms
    assert not np.any(kl[0, SEGMENTS[0] == 0])
    assert relative(u[0], transcribed(case).u) < 3e-6  # asking for the loss changes nothing else


@functools.cache
def loss_gradient(case: str):
    """Of the mean over real tokens, with respect to attention's parameters and input."""

    def loss(attn, x):
        kl = attn(x, rope_at(POSITIONS, attn.config), SEGMENTS, with_indexer_loss=True)[1]
        return jnp.sum(kl) / np.sum(SEGMENTS != 0)

    return quick_jit(jax.grad(loss, argnums=(0, 1)))(attention(case), jnp.asarray(X))


@pytest.mark.parametrize("case", WITH_INDEXER)
def test_gradient_of_the_indexer_loss(case):
    """Against finite differences of the float64 transcription, along a random direction of each parameter.

    The steps are small because a ReLU that changes sides on the way is the largest error.
    """
    gradient = dict(variables(loss_gradient(case)[0].indexer))
    parameters = indexer_parameters(attention(case))
    assert set(gradient) == set(parameters)
    for path, value in parameters.items():
        step = 1e-7 * np.random.RandomState(1).standard_normal(value.shape)
        at = [
            np.sum(kl_by_hand(case, parameters | {path: value + sign * step})) / np.sum(SEGMENTS != 0)
            for sign in (-1, 1)
        ]
        along = np.sum(float64(gradient[path]) * step)
        assert along == pytest.approx((at[1] - at[0]) / 2, rel=1e-4), path


@pytest.mark.parametrize("case", WITH_INDEXER)
def test_the_indexer_loss_reaches_the_indexer_alone(case):
    gradient, d_x = loss_gradient(case)
    assert not np.any(d_x)
    for path, variable in variables(gradient):
        assert np.any(variable[...]) == path.startswith("indexer."), path


@pytest.mark.parametrize("suffix", ["", ", all keys"])
def test_gradients_of_the_indexer_loss_are_the_same_in_both_forms(suffix):
    mha, mqa = (dict(variables(loss_gradient(form + suffix)[0].indexer)) for form in ("mha", "mqa"))
    for path in mha:
        assert relative(mqa[path][...], mha[path][...]) < 1e-5, path


@pytest.mark.parametrize("case", ["mha", "mqa", "v3"])
def test_gradient_of_the_output(case):
    """With respect to the input, against finite differences of the transcription; the selection stays."""
    cotangent = np.random.RandomState(2).standard_normal((LENGTH, 128))
    direction = np.random.RandomState(3).standard_normal((LENGTH, 128))

    def total(x):
        u, _, _ = attention(case)(x, rope_at(POSITIONS, attention(case).config), SEGMENTS)
        return jnp.sum(u[0] * cotangent)

    gradient = quick_jit(jax.grad(total))(jnp.asarray(X))[0]
    at = [
        AttentionTranscription(
            attention(case), X[0].astype(np.float64) + sign * 1e-5 * direction, POSITIONS[0], attended(case)
        ).u
        for sign in (-1, 1)
    ]
    expected = np.sum((at[1] - at[0]) * cotangent) / 2e-5
    assert np.sum(np.asarray(gradient, np.float64) * direction) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
@pytest.mark.parametrize("case", ["mqa, all keys", "v3"])
def test_decoding_with_the_kernels_of_an_accelerator(platform, case):
    """With and without an indexer: whatever form of a selection they read. TPUs multiply in bfloat16."""
    attn, first = attention(case), LENGTH - 4

    @quick_jit
    def decode(attn, x, number, cache):
        return attn.decode(x, rope_at(number, attn.config), number, cache)[0]

    everyone, place = np.ones_like(SEGMENTS), np.arange(LENGTH, dtype=np.int32)[None]
    latents = attn.project(X, rope_at(place, attn.config))[1]
    expected = decode(attn, X[:, first:], place[:, first:], latents)
    whole = attn(X, rope_at(place, attn.config), everyone)[0]
    assert relative(expected, whole[:, first:]) < 1e-5
    with interpreted(platform):
        found = decode(attn, X[:, first:], place[:, first:], latents)
    assert relative(found, expected) < (1e-2 if platform == "tpu" else 1e-5)

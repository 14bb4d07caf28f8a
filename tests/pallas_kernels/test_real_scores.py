"""Selection and its neighbours on what a trained indexer says of real text: the standard library's source."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import quick_jit, relative
from small_model import through_layers
from small_run import batch_of, compiled_step, small_run
from sorted_selection import check_selection, mask_of, selected_by_sorting

from dsjax.precision.act_quant import act_quant
from dsjax.train.state import initial_state
from pallas_kernels.indexer.api import index_scores
from pallas_kernels.sparse_mla.union_share import union_share
from pallas_kernels.visibility import Visibility

pytestmark = pytest.mark.slow
on_every_platform = pytest.mark.parametrize("implementation", ["reference", "tpu", "gpu"], indirect=True)
STEPS, LENGTH, KEYS, QUERIES, K = 60, 128, 2304, 64, 256
scores_of = quick_jit(index_scores, static_argnames="implementation")


def characters() -> np.ndarray:
    """Of a few modules, each below 128."""
    folder = Path(os.__file__).parent
    names = (
        "argparse",
        "ast",
        "calendar",
        "dataclasses",
        "difflib",
        "inspect",
        "pathlib",
        "textwrap",
        "typing",
    )
    files = [folder / f"{name}.py" for name in names]
    text = b"".join(file.read_bytes() for file in files if file.exists())
    return np.minimum(np.frombuffer(text, np.uint8), 127).astype(np.int32)


@pytest.fixture(scope="module")
def indexers() -> list[tuple]:
    """q, k, w of the last queries and of all keys of a text, for each layer of a model trained on other text.

    The indexer is the released one, whose q and k are numbers of e4m3 with a scale.
    """
    config = small_run(
        vocab_size=128, index_precision="exact", max_position_embeddings=KEYS, num_nextn_predict_layers=0
    )
    config.optimizer.lr, config.optimizer.warmup_steps = 3e-3, 5
    config.freeze()
    text, step, state = characters(), compiled_step(config), initial_state(config)
    random, losses = np.random.RandomState(0), []
    for _ in range(STEPS):
        starts = random.randint(KEYS, len(text) - LENGTH - 1, 4)
        state, metrics = step(state, batch_of(np.stack([text[s : s + LENGTH + 1] for s in starts])))
        losses.append((float(metrics["train/loss"]), float(metrics["indexer/kl"])))
    assert losses[-1][0] < 0.8 * losses[0][0]

    def index(layer, x, rope, _):
        attn, x = layer.self_attn, layer.input_layernorm(x)
        query = attn.indexer.query(x, attn.q_a_layernorm(attn.q_a_proj(x)), rope)
        return query.q[:, -QUERIES:], attn.indexer.key(x, rope), query.w[:, -QUERIES:]

    stacks = quick_jit(lambda model, tokens: through_layers(model, index, tokens))(
        state.model, text[None, :KEYS]
    )
    return [jax.tree.map(lambda x, i=i: x[i], stack) for stack in stacks for i in range(stack[0].shape[0])]


def limits() -> Visibility:
    """Three documents, the last of them of almost all that the queries may see."""
    segment = 1 + np.searchsorted([200, 250], np.arange(KEYS, dtype=np.int32), side="right").astype(np.int32)
    number = np.arange(KEYS, dtype=np.int32)
    return Visibility(number[None, -QUERIES:], segment[None, -QUERIES:], segment[None])


def of_model(index) -> np.ndarray:
    return np.asarray(scores_of(*index, limits(), implementation="reference"))


@on_every_platform
def test_selection(implementation, indexers):
    """As the model computes the scores, and rounded to bfloat16, where many are equal."""
    for index in indexers:
        scores = of_model(index)
        rounded = np.asarray(scores.astype(jnp.bfloat16), np.float32)
        distinct = [len(np.unique(row[np.isfinite(row)])) for row in rounded[0]]
        assert np.mean(distinct) < 0.5 * (KEYS - 250)
        check_selection(implementation, scores, K)
        check_selection(implementation, rounded, K)


@on_every_platform
def test_through_e4m3(implementation, indexers):
    """The same scores to float32's rounding, and the selection that follows from them."""
    for q, k, w in indexers:
        (q8, q_scale), (k8, k_scale) = act_quant(q), act_quant(k)
        quantised = q8, k8, w * q_scale[..., 0], limits(), k_scale[..., 0]
        scores = np.asarray(scores_of(*quantised, implementation=implementation))
        model = of_model((q, k, w))
        seen = np.isfinite(model)
        np.testing.assert_array_equal(np.isfinite(scores), seen)
        assert relative(scores[seen], model[seen]) < 3e-7
        check_selection(implementation, scores, K)
        same = selected_by_sorting(scores, K) & selected_by_sorting(model, K)
        assert np.count_nonzero(same) > 0.999 * QUERIES * K


def test_neighbours_share_keys(indexers):
    """More than by chance, in every layer: what makes the TPU's union of 32 queries worth while."""

    def growth(scores) -> float:
        selection = mask_of(scores.astype(np.float32), K, implementation="reference")
        return float(union_share(selection, QUERIES).growth)

    real = [growth(of_model(index)) for index in indexers]
    seen, random = np.isfinite(of_model(indexers[0])), np.random.RandomState(1)
    by_chance = growth(np.where(seen, random.uniform(size=seen.shape), -np.inf))
    assert min(real) >= 1
    assert max(real) < 0.9 * by_chance

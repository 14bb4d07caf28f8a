"""The schedule and AdamW against float64 numpy written from their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_run import small_run

from dsjax.config import OptimizerConfig
from dsjax.train.optimizer import build_optimizer, decayed, learning_rate
from dsjax.train.state import initial_state

REPORT = OptimizerConfig(
    lr=2.2e-4,
    warmup_steps=2000,
    cosine_start_step=10_000,
    cosine_end_step=14_300,
    lr_floor=2.2e-5,
    last_start_step=14_633,
    lr_last=7.3e-6,
)


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 2.2e-4 / 2000),
        (999, 1.1e-4),
        (1999, 2.2e-4),
        (9_999, 2.2e-4),
        (12_150, 2.2e-5 + (2.2e-4 - 2.2e-5) / 2),
        (14_300, 2.2e-5),
        (14_632, 2.2e-5),
        (14_633, 7.3e-6),
        (20_000, 7.3e-6),
    ],
)
def test_the_rate_has_the_shape_of_the_report(step, rate):
    assert float(learning_rate(REPORT, step)) == pytest.approx(rate, rel=1e-5)


def test_without_cosine_the_rate_stays():
    config = OptimizerConfig(lr=1e-3, warmup_steps=10)
    assert [float(learning_rate(config, s)) for s in (9, 10, 100_000)] == pytest.approx([1e-3] * 3)


def numpy_adamw(config, parameter, gradients, decay):
    """Three lines of Adam in float64."""
    p, m, v = parameter.astype(np.float64), 0.0, 0.0

    def kept(moment):
        return moment.astype(config.moment_dtype).astype(np.float64)

    for t, g in enumerate(gradients):
        g = g.astype(np.float64) * min(1.0, config.clip_norm / np.linalg.norm(g))
        m = kept(config.beta1 * m + (1 - config.beta1) * g)
        v = kept(config.beta2 * v + (1 - config.beta2) * g * g)
        step = m / (1 - config.beta1 ** (t + 1)) / (np.sqrt(v / (1 - config.beta2 ** (t + 1))) + config.eps)
        p = p - float(learning_rate(config, t)) * (step + decay * config.weight_decay * p)
    return p


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(7, 5), (7,)])
def test_adamw_is_the_formula_and_decays_matrices_only(shape, moments):
    config = OptimizerConfig(lr=1e-2, warmup_steps=3, moment_dtype=moments)
    rng = np.random.default_rng(0)
    parameter = rng.normal(size=shape).astype(np.float32)
    gradients = [rng.normal(size=shape).astype(np.float32) * scale for scale in (0.01, 3, 0.1, 1, 1)]
    optimizer = build_optimizer(config)
    axes = ("embed", "mlp")[: len(shape)]
    params = nnx.State({"w": nnx.Param(jnp.asarray(parameter), axes=axes)})
    state = optimizer.init(params)
    for gradient in gradients:
        gradients_of = jax.tree.map(lambda p, g=gradient: jnp.asarray(g), params)
        norm = jnp.linalg.norm(gradient)
        updates, state = optimizer.update(gradients_of, state, params, grad_norm=norm)
        params = jax.tree.map(jnp.add, params, updates)
    expected = numpy_adamw(config, parameter, gradients, decay=float(len(shape) > 1))
    difference = np.linalg.norm(params["w"][...] - expected) / np.linalg.norm(expected - parameter)
    assert difference < 1e-5
    stored = [leaf.dtype for leaf in jax.tree.leaves(state) if leaf.shape == shape]
    assert stored == [jnp.dtype(moments)] * 2


def test_norms_are_not_decayed_even_when_stacked_and_the_router_bias_is_no_parameter():
    state = initial_state(small_run().freeze())
    params = nnx.state(state.model, nnx.Param)
    leaves, _ = jax.tree_util.tree_flatten_with_path(decayed(params))
    flags = {jax.tree_util.keystr(path): flag for path, flag in leaves}
    norms = {name for name in flags if "norm" in name}
    assert norms
    assert {name for name, flag in flags.items() if not flag} == norms
    assert not any("e_score_correction_bias" in name for name in flags)

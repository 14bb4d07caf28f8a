"""The chosen experts against a loop over tokens in float64."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import normal, quick_jit, relative

from pallas_kernels.expert_mlp.api import expert_mlp

run = quick_jit(expert_mlp, static_argnames="implementation")
IMPLEMENTATIONS = ["reference", "tpu"]  # the latter is three grouped products, which run everywhere
D, F = 24, 40


def even(tokens: int, experts: int, k: int) -> np.ndarray:
    return (np.arange(tokens)[:, None] * k + np.arange(k)) % experts


def skewed(tokens: int, experts: int, k: int) -> np.ndarray:
    """Expert 0 in almost every row, the last experts in none."""
    scores = np.random.RandomState(0).uniform(size=(tokens, experts)) - np.arange(experts) / experts
    return np.argsort(-scores, axis=1)[:, :k]


ROUTINGS = {
    "even": (even(64, 8, 4), 8),
    "skewed, blocks cut short": (skewed(300, 8, 2), 8),
    "several blocks an expert": (skewed(700, 4, 2), 4),
    "one expert has every token": (np.full((130, 1), 2), 5),
    "one expert": (np.zeros((77, 1), int), 1),
    "every expert for every token": (even(33, 4, 4), 4),
    "one token": (np.array([[3, 60, 17]]), 64),
    "256 experts, one of 8 tokens each": (np.arange(64).reshape(8, 8) * 4, 256),
}


def inputs(name: str, dtype=jnp.float32):
    experts, count = ROUTINGS[name]
    arrays = [normal(0, len(experts), D), normal(1, *experts.shape)]
    arrays += [0.3 * normal(seed, count, *shape) for seed, shape in ((2, (D, F)), (3, (D, F)), (4, (F, D)))]
    x, weights, *matrices = [jnp.asarray(array, jnp.float32) for array in arrays]
    return x.astype(dtype), jnp.asarray(experts, jnp.int32), weights, *(m.astype(dtype) for m in matrices)


def by_formula(x, experts, weights, gate, up, down) -> np.ndarray:
    x, weights, gate, up, down = (np.asarray(a, np.float64) for a in (x, weights, gate, up, down))
    y = np.zeros(x.shape)
    for n, k in np.ndindex(*experts.shape):
        e = experts[n, k]
        a = x[n] @ gate[e]
        y[n] += weights[n, k] * (a / (1 + np.exp(-a)) * (x[n] @ up[e])) @ down[e]
    return y


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, indirect=True)
@pytest.mark.parametrize("name", ROUTINGS)
def test_output(name, implementation):
    arrays = inputs(name)
    y = run(*arrays, implementation=implementation)
    assert y.dtype == jnp.float32
    assert relative(y, by_formula(*arrays)) < 1e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, indirect=True)
def test_bfloat16(implementation):
    arrays = inputs("several blocks an expert", jnp.bfloat16)
    assert relative(run(*arrays, implementation=implementation), by_formula(*arrays)) < 5e-3


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, indirect=True)
@pytest.mark.parametrize("name", ["several blocks an expert", "one expert has every token", "one token"])
def test_gradients(name, implementation):
    """Against the automatic gradient of a plain sum over all experts, each computed for every token."""
    x, experts, *differentiable = inputs(name)
    cotangent = normal(9, *x.shape)

    def everyone(x, weights, gate, up, down):
        share = jnp.zeros((len(x), len(gate))).at[jnp.arange(len(x))[:, None], experts].add(weights)
        h = jax.nn.silu(jnp.einsum("nd,edf->enf", x, gate)) * jnp.einsum("nd,edf->enf", x, up)
        return jnp.einsum("ne,enf,efd->nd", share, h, down)

    def loss(function):
        return lambda *args: jnp.sum(function(*args) * cotangent)

    def ours(x, *rest):
        return expert_mlp(x, experts, *rest, implementation=implementation)

    arguments = (x, *differentiable)
    with jax.default_matmul_precision("highest"):
        of_ours, expected = (
            quick_jit(jax.grad(loss(f), argnums=range(5)))(*arguments) for f in (ours, everyone)
        )
    for found, wanted in zip(of_ours, expected, strict=True):
        assert relative(found, wanted) < 2e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, indirect=True)
@pytest.mark.parametrize(
    "name", ["skewed, blocks cut short", "one token", "256 experts, one of 8 tokens each"]
)
def test_a_layer_where_it_lies_in_its_stack(name, implementation):
    x, experts, weights, *matrices = inputs(name)
    stacked = [jnp.stack([2 * matrix, matrix, 0 * matrix]) for matrix in matrices]
    found = run(x, experts, weights, *stacked, layer=jnp.int32(1), implementation=implementation)
    assert relative(found, by_formula(x, experts, weights, *matrices)) < 1e-6


def test_experts_without_tokens_get_no_gradient():
    x, experts, *rest = inputs("one expert has every token")
    d_gate = quick_jit(jax.grad(lambda gate: jnp.sum(expert_mlp(x, experts, rest[0], gate, *rest[2:]))))(
        rest[1]
    )
    used = np.flatnonzero(np.any(np.asarray(d_gate), axis=(1, 2)))
    assert used.tolist() == [2]


def seconds(experts: int, *, gradient: bool) -> float:
    """The fastest of several runs over 2,048 tokens and 2 experts each."""
    x = jnp.asarray(normal(0, 2048, 128))
    arrays = [jnp.asarray(normal(seed, experts, 128, 128)) for seed in (1, 2, 3)]
    chosen, weights = jnp.asarray(even(2048, experts, 2), jnp.int32), jnp.ones((2048, 2))

    def loss(x, gate, up, down):
        return jnp.sum(expert_mlp(x, chosen, weights, gate, up, down) ** 2)

    function = jax.jit(jax.grad(loss, argnums=range(4)) if gradient else loss)
    jax.block_until_ready(function(x, *arrays))
    times = []
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(function(x, *arrays))
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "backward"])
def test_the_cost_is_that_of_the_chosen_experts(gradient):
    """Every token by every expert would take 8 times as long with 64 experts as with 8."""
    assert seconds(64, gradient=gradient) < 3 * seconds(8, gradient=gradient)

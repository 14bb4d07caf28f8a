"""Routing, expert sums and balancing against the V3 report §2.1.2, written as loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import quick_jit, relative
from small_model import call, random_model, small_config

from dsjax.models.moe import RouterBias, Routing, balance_stats
from dsjax.models.stack import layer_at

EXPERTS, PER_TOKEN = 16, 4


def moe_layer(seed: int = 0, **changes):
    return layer_at(random_model(small_config(**changes), seed).moe_layers, 1).mlp


def hidden(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal((*shape, 128)).astype(np.float32)


def selected_by_hand(scores: np.ndarray, bias: np.ndarray, groups: int, kept: int) -> list[int]:
    """The experts of one token: best groups by their two best, then best experts; ties to the lowest index."""
    biased = [float(np.float32(s) + np.float32(b)) for s, b in zip(scores, bias, strict=True)]
    size = len(biased) // groups

    def of_group(group):
        best, second = sorted(biased[group * size : (group + 1) * size])[-1:-3:-1]
        return float(np.float32(best) + np.float32(second))

    ranked = sorted(range(groups), key=lambda group: (-of_group(group), group))[:kept]
    allowed = [expert for expert in range(len(biased)) if expert // size in ranked]
    return sorted(allowed, key=lambda expert: (-biased[expert], expert))[:PER_TOKEN]


def check_routing(router, x, groups: int, kept: int) -> Routing:
    """Scores against the formula; experts and weights against what follows from these very scores."""
    routing = jax.tree.map(np.asarray, call(router, x))
    logits = x.astype(np.float64) @ np.asarray(router.weight[...], np.float64)
    assert relative(routing.scores, 1 / (1 + np.exp(-logits))) < 1e-6
    bias = np.asarray(router.e_score_correction_bias[...])
    for token in np.ndindex(routing.scores.shape[:-1]):
        scores = routing.scores[token]
        expected = selected_by_hand(scores, bias, groups, kept)
        assert sorted(routing.experts[token]) == sorted(expected)
        chosen = scores[routing.experts[token]].astype(np.float64)
        np.testing.assert_allclose(routing.weights[token], 2.5 * chosen / chosen.sum(), rtol=1e-6)
    return routing


@pytest.mark.parametrize(("groups", "kept"), [(4, 2), (8, 2), (8, 3), (1, 1), (4, 4)])
def test_routing(groups, kept):
    router = moe_layer(n_group=groups, topk_group=kept).gate
    check_routing(router, 3 * hidden(2, 100), groups, kept)


def test_groups_left_out_stay_out_when_every_biased_score_is_negative():
    """Masked with 0 instead of -inf they would win over all groups that were kept."""
    router = moe_layer().gate
    router.e_score_correction_bias[...] = jnp.asarray(np.linspace(-5, -4, EXPERTS), jnp.float32)
    routing = check_routing(router, hidden(1, 50), 4, 2)
    assert all(len(set(row // 4)) <= 2 for row in routing.experts[0])


def test_ties_go_to_the_lowest_expert_and_the_lowest_group():
    router = moe_layer().gate
    router.e_score_correction_bias[...] = jnp.zeros(EXPERTS)
    columns = np.random.RandomState(0).standard_normal((128, 3))
    router.weight[...] = jnp.asarray(columns[:, np.arange(EXPERTS) % 3], jnp.float32)
    check_routing(router, hidden(1, 50), 4, 2)
    router.weight[...] = jnp.zeros((128, EXPERTS))
    routing = check_routing(router, hidden(1, 3), 4, 2)
    assert np.array_equal(np.sort(routing.experts[0]), [[0, 1, 2, 3]] * 3)


def test_the_bias_chooses_and_does_not_weigh():
    router = moe_layer().gate
    router.e_score_correction_bias[...] = jnp.zeros(EXPERTS)
    x = hidden(1, 200)
    without = call(router, x)
    router.e_score_correction_bias[...] = jnp.where(jnp.arange(EXPERTS) == 5, 10.0, 0.0)
    with_bias = check_routing(router, x, 4, 2)
    assert np.all(np.any(with_bias.experts == 5, axis=-1))
    assert not np.all(np.any(np.asarray(without.experts) == 5, axis=-1))
    np.testing.assert_array_equal(with_bias.scores, without.scores)
    router.e_score_correction_bias[...] = jnp.full(EXPERTS, 3.0)  # the same for all changes nothing
    np.testing.assert_allclose(call(router, x).weights, without.weights, rtol=1e-6)


def test_weights_are_not_normalised_where_the_configuration_says_so():
    router = moe_layer(norm_topk_prob=False).gate
    routing = call(router, hidden(1, 20))
    chosen = np.take_along_axis(np.asarray(routing.scores), np.asarray(routing.experts), axis=-1)
    np.testing.assert_allclose(routing.weights, 2.5 * chosen, rtol=1e-6)


def test_the_router_works_in_float32_whatever_comes_in():
    router = moe_layer().gate
    x = jnp.asarray(hidden(1, 50), jnp.bfloat16)
    routing = call(router, x)
    logits = np.asarray(x, np.float64) @ np.asarray(router.weight[...], np.float64)
    assert {routing.scores.dtype, routing.weights.dtype} == {jnp.dtype("float32")}
    assert relative(routing.scores, 1 / (1 + np.exp(-logits))) < 1e-6


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def by_loop(experts, x: np.ndarray, routing: Routing) -> np.ndarray:
    """``Σ_k weight_k · expert_k(x)``, an expert at a time, in float64; x [N, D]."""
    gate, up, down = (
        np.asarray(p[...], np.float64) for p in (experts.gate_proj, experts.up_proj, experts.down_proj)
    )
    y = np.zeros(x.shape)
    for expert in range(len(gate)):
        token, place = np.nonzero(np.asarray(routing.experts) == expert)
        rows = x[token].astype(np.float64)
        out = (silu(rows @ gate[expert]) * (rows @ up[expert])) @ down[expert]
        np.add.at(y, token, np.asarray(routing.weights, np.float64)[token, place, None] * out)
    return y


def distinct_experts(tokens: int, allowed: range, seed: int = 0) -> np.ndarray:
    random = np.random.RandomState(seed)
    rows = [random.choice(np.array(allowed), PER_TOKEN, replace=False) for _ in range(tokens)]
    return np.array(rows, np.int32)


LOADS = {
    "even": distinct_experts(130, range(EXPERTS)),
    "one group": distinct_experts(130, range(8, 12)),
    "the same experts, in one order": np.tile(np.array([3, 15, 0, 9], np.int32), (130, 1)),
    "one token": distinct_experts(1, range(EXPERTS)),
}


@pytest.mark.parametrize("load", LOADS)
def test_no_token_is_dropped(load):
    experts = moe_layer().experts
    chosen = LOADS[load]
    x = hidden(len(chosen))
    weights = np.random.RandomState(1).uniform(0, 1, chosen.shape).astype(np.float32)
    routing = Routing(chosen, weights, None)
    y = call(experts, x, routing)
    assert y.dtype == jnp.float32
    assert relative(y, by_loop(experts, x, routing)) < 1e-6


def test_no_token_is_dropped_when_the_bias_sends_all_to_one_group():
    mlp = moe_layer(topk_group=1, n_shared_experts=2)
    mlp.gate.e_score_correction_bias[...] = jnp.where(jnp.arange(EXPERTS) // 4 == 2, 9.0, 0.0)
    x = hidden(2, 90)
    y, stats = call(mlp, x, np.ones((2, 90), bool))
    np.testing.assert_array_equal(stats.load, np.where(np.arange(EXPERTS) // 4 == 2, 180, 0))
    routing = call(mlp.gate, x.reshape(-1, 128))
    shared = mlp.shared_experts
    gate, up, down = (
        np.asarray(p.weight[...], np.float64) for p in (shared.gate_proj, shared.up_proj, shared.down_proj)
    )
    rows = x.reshape(-1, 128).astype(np.float64)
    expected = by_loop(mlp.experts, x.reshape(-1, 128), routing) + (silu(rows @ gate) * (rows @ up)) @ down
    assert relative(y.reshape(-1, 128), expected) < 1e-6


@pytest.mark.parametrize("load", ["even", "one group", "one token"])
def test_gradients_of_the_dispatch(load):
    """Against every expert applied to every token and weighed with 0 where it was not chosen."""
    experts = moe_layer().experts
    chosen = LOADS[load]
    x, cotangent = jnp.asarray(hidden(len(chosen))), hidden(len(chosen), seed=2)
    weights = np.random.RandomState(1).uniform(0, 1, chosen.shape).astype(np.float32)

    def sorted_by_expert(experts, x, weights):
        return jnp.sum(experts(x, Routing(chosen, weights, None)) * cotangent)

    def every_expert(experts, x, weights):
        one_hot = jax.nn.one_hot(chosen, EXPERTS)
        gate = jnp.einsum("nd,edf->nef", x, experts.gate_proj[...], precision="highest")
        up = jnp.einsum("nd,edf->nef", x, experts.up_proj[...], precision="highest")
        y = jnp.einsum("nef,efd->ned", jax.nn.silu(gate) * up, experts.down_proj[...], precision="highest")
        return jnp.einsum("nk,nke,ned,nd->", weights, one_hot, y, cotangent, precision="highest")

    gradients = quick_jit(jax.grad(sorted_by_expert, argnums=(0, 1, 2)))(experts, x, weights)
    expected = quick_jit(jax.grad(every_expert, argnums=(0, 1, 2)))(experts, x, weights)
    jax.tree.map(lambda a, b: _assert_near(a, b), gradients, expected)


def _assert_near(a, b):
    assert np.linalg.norm(b) > 0
    assert relative(a, b) < 1e-5


def test_gradient_reaches_the_router_through_the_weights_and_never_its_bias():
    mlp = moe_layer()
    x, cotangent = hidden(1, 60), hidden(1, 60, seed=2)

    def loss(mlp):
        y, stats = mlp(x, np.ones((1, 60), bool))
        return jnp.sum(y * cotangent) + stats.balance_loss

    gradient = quick_jit(jax.grad(loss))(mlp)
    assert isinstance(gradient.gate.e_score_correction_bias, RouterBias)
    assert gradient.gate.e_score_correction_bias.dtype == jnp.float32
    assert not np.any(gradient.gate.e_score_correction_bias[...])
    experts = np.asarray(call(mlp.gate, x[0]).experts)
    weight = np.asarray(mlp.gate.weight[...], np.float64)

    def loss_by_hand(weight):
        scores = 1 / (1 + np.exp(-x[0].astype(np.float64) @ weight))
        chosen = np.take_along_axis(scores, experts, axis=-1)
        routing = Routing(experts, 2.5 * chosen / chosen.sum(-1, keepdims=True), scores)
        return np.sum(by_loop(mlp.experts, x[0], routing) * cotangent[0]) + balance_by_hand(routing)

    step = 1e-5 * np.random.RandomState(3).standard_normal(weight.shape)
    expected = (loss_by_hand(weight + step) - loss_by_hand(weight - step)) / 2
    assert np.sum(np.asarray(gradient.gate.weight[...]) * step) == pytest.approx(expected, rel=1e-5)


def balance_by_hand(routing: Routing) -> float:
    """``Σ_i f_i P_i`` of one sequence, V3 report eq. 17-20; routing [T, ·]."""
    scores, chosen = np.asarray(routing.scores, np.float64), np.asarray(routing.experts)
    total = 0.0
    for i in range(EXPERTS):
        f = EXPERTS / (PER_TOKEN * len(scores)) * sum(i in row for row in chosen)
        p = np.mean(scores[:, i] / scores.sum(axis=1))
        total += f * p
    return total


def test_balance_statistics_leave_padding_out():
    lengths = [40, 25, 0]
    real = np.arange(40) < np.array(lengths)[:, None]
    random = np.random.RandomState(0)
    scores = random.uniform(0.01, 1, (3, 40, EXPERTS)).astype(np.float32)
    experts = np.argsort(-scores * random.uniform(0, 1, EXPERTS), axis=-1)[..., :PER_TOKEN].astype(np.int32)
    weights = np.take_along_axis(scores, experts, axis=-1)
    stats = quick_jit(balance_stats)(Routing(experts, weights, scores), real)
    load = [np.sum(experts[real] == i) for i in range(EXPERTS)]
    np.testing.assert_array_equal(stats.load, load)
    each = [balance_by_hand(Routing(experts[b, :n], None, scores[b, :n])) for b, n in enumerate(lengths[:2])]
    assert float(stats.balance_loss) == pytest.approx(np.sum(each), rel=1e-6)


def test_balance_loss_is_one_when_the_load_is_even():
    scores = jnp.full((1, 64, EXPERTS), 0.3)
    experts = (np.arange(64)[:, None] + 4 * np.arange(PER_TOKEN)) % EXPERTS
    routing = Routing(jnp.asarray(experts[None]), scores[..., :PER_TOKEN], scores)
    assert float(balance_stats(routing, jnp.ones((1, 64), bool)).balance_loss) == pytest.approx(1.0, rel=1e-6)

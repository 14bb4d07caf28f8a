"""Wrong arguments get a sentence with the fix, from every implementation, before anything runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import normal
from refusals import a, refused

from pallas_kernels.decode.api import paged_index_scores, paged_sparse_mla, write
from pallas_kernels.decode.cache import empty
from pallas_kernels.expert_mlp.api import expert_mlp
from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.indexer.api import index_scores
from pallas_kernels.platform import UnsupportedError, debug, interpreted
from pallas_kernels.selection import pack_mask
from pallas_kernels.sparse_mla.api import sparse_mla
from pallas_kernels.topk.api import select, topk_indices, topk_mask
from pallas_kernels.visibility import Visibility

on_every_platform = pytest.mark.parametrize("implementation", ["reference", "tpu", "gpu"], indirect=True)
B, T, H, C, R, N, J, S, K = 2, 37, 3, 24, 8, 5, 16, 90, 7
OF_T, OF_S, E4M3 = (B, T), (B, S), jnp.float8_e4m3fn

LIMITS = Visibility(a("int32", *OF_T), a("int32", *OF_T), a("int32", *OF_S))
SCORES = {
    "q": a("bfloat16", B, T, N, J),
    "k": a("bfloat16", B, S, J),
    "w": a("float32", B, T, N),
    "visibility": LIMITS,
}
IN_E4M3 = SCORES | {"q": a(E4M3, B, T, N, J), "k": a(E4M3, B, S, J), "k_scale": a("float32", B, S)}
ATTENTION = {"q": a("bfloat16", B, T, H, C + R), "kv": a("bfloat16", B, S, C + R)}

WRONG_SCORES = {
    "head width": (SCORES | {"k": a("bfloat16", B, S, 24)}, r"k is bfloat16\[2, 90, 24\].*J = 16 as in q"),
    "heads": (SCORES | {"w": a("float32", B, T, 4)}, r"w is float32\[2, 37, 4\].*\[B, T, N\].*N = 5 as in q"),
    "axes": (SCORES | {"w": a("float32", B, T)}, r"w is float32\[2, 37\], and it should be \[B, T, N\]"),
    "batch": (SCORES | {"k": a("bfloat16", 1, S, J)}, r"k is bfloat16\[1, 90, 16\].*B = 2 as in q"),
    "no keys": (SCORES | {"k": a("bfloat16", B, 0, J)}, r"k is bfloat16\[2, 0, 16\].*none of them 0"),
    "limits of other keys": (
        SCORES | {"visibility": LIMITS._replace(key_segment=a("int32", B, 91))},
        r"visibility\.key_segment is int32\[2, 91\].*S = 90 as in k",
    ),
    "limits in 64 bits": (
        SCORES | {"visibility": LIMITS._replace(query_index=a("int64", *OF_T))},
        r"visibility\.query_index is int64\[2, 37\], and it should be int32: cast it",
    ),
    "two dtypes": (SCORES | {"k": a("float32", B, S, J)}, r"k is float32.*should be bfloat16 as q is: cast"),
    "half precision": (
        SCORES | {"q": a("float16", B, T, N, J), "k": a("float16", B, S, J)},
        r"q is float16\[2, 37, 5, 16\], and it should be bfloat16 or float32: cast it",
    ),
    "no queries": (SCORES | {"q": None}, r"q is None, and it should be an array \[B, T, N, J\]"),
    "weights in 64 bits": (SCORES | {"w": a("float64", B, T, N)}, r"w is float64\[2, 37, 5\], and"),
    "integer weights": (SCORES | {"w": a("int32", B, T, N)}, r"w is int32\[2, 37, 5\].*bfloat16 or float32"),
    "e4m3 keys alone": (IN_E4M3 | {"q": SCORES["q"]}, r"k_scale was given with q in bfloat16"),
    "e4m3 queries alone": (IN_E4M3 | {"k": SCORES["k"]}, r"k is bfloat16.*float8_e4m3fn as q is"),
    "a scale a query": (IN_E4M3 | {"k_scale": a("float32", B, T)}, r"k_scale is float32\[2, 37\].*S = 90 as in k"),
    "a scale of bytes": (IN_E4M3 | {"k_scale": a("uint8", B, S)}, r"k_scale is uint8\[2, 90\].*or float32"),
}  # fmt: skip
WRONG_ATTENTION = {
    "width": (ATTENTION | {"kv": a("bfloat16", B, S, C)}, r"kv is bfloat16\[2, 90, 24\].*X = 32 as in q"),
    "axes": (ATTENTION | {"kv": a("bfloat16", B, S, 1, C + R)}, r"kv is bfloat16\[2, 90, 1, 32\].*\[B, S, X\]"),
    "two dtypes": (ATTENTION | {"kv": a("float32", B, S, C + R)}, r"kv is float32.*should be bfloat16 as q is"),
    "half precision": (
        {"q": a("float16", B, T, H, C + R), "kv": a("float16", B, S, C + R)},
        r"q is float16\[2, 37, 3, 32\], and it should be bfloat16 or float32",
    ),
    "nothing but latents": (
        ATTENTION | {"latent_dim": C + R},
        r"latent_dim is 32, and rows are 32 wide: it should be from 1 to 31",
    ),
    "no latents": (ATTENTION | {"latent_dim": 0}, r"latent_dim is 0, and rows are 32 wide"),
    "64 bits": (
        ATTENTION | {"selection": a("int64", B, T, K)},
        r"selection is int64\[2, 37, 7\].*list of indices int32\[B, T, K\] or a packed mask uint32\[B, W, S\]",
    ),
    "a mask of bytes": (ATTENTION | {"selection": a("bool", B, T, S)}, r"selection is bool\[2, 37, 90\].*packed mask"),
}  # fmt: skip


@on_every_platform
@pytest.mark.parametrize("name", WRONG_SCORES)
def test_index_scores(implementation, name):
    arguments, sentence = WRONG_SCORES[name]
    refused(index_scores, arguments, sentence, implementation=implementation)


@on_every_platform
@pytest.mark.parametrize("arguments", [SCORES, IN_E4M3])
def test_what_fits_is_taken(implementation, arguments):
    scores = jax.eval_shape(lambda x: index_scores(**x, implementation=implementation), arguments)
    assert scores == a("float32", B, T, S)


@on_every_platform
@pytest.mark.parametrize("name", WRONG_ATTENTION)
def test_sparse_mla(implementation, name):
    arguments, sentence = WRONG_ATTENTION[name]
    options = {"latent_dim": C, "scale": 1.0, "implementation": implementation}
    options |= {name: arguments[name] for name in ("latent_dim",) if name in arguments}
    selection = a("uint32", B, 2, S) if implementation == "tpu" else a("int32", B, T, K)
    arrays = {"selection": selection} | {name: x for name, x in arguments.items() if name != "latent_dim"}
    refused(sparse_mla, arrays, sentence, **options)


@on_every_platform
def test_a_selection_of_another_batch_or_of_other_queries(implementation):
    options = {"latent_dim": C, "scale": 1.0, "implementation": implementation}
    is_mask = implementation == "tpu"
    batch = a("uint32", 1, 2, S) if is_mask else a("int32", 1, T, K)
    sentence = r"selection is u?int32\[1, .*it should be of 37 queries in a batch of 2"
    refused(sparse_mla, ATTENTION | {"selection": batch}, sentence, **options)
    queries = a("uint32", B, 1, S) if is_mask else a("int32", B, T - 1, K)
    sentence = (
        r".*for 37 queries.*given uint32\[2, 1, 90\]" if is_mask else r".*of 37 queries in a batch of 2"
    )
    refused(sparse_mla, ATTENTION | {"selection": queries}, sentence, **options)


@on_every_platform
@pytest.mark.parametrize("op", [select, topk_indices, topk_mask])
def test_topk(implementation, op):
    options = {"implementation": implementation}
    scores = {"scores": a("float32", B, T, S)}
    refused(op, scores, r"k is 0, and it should be at least 1", k=0, **options)
    refused(op, scores, r"k is -3, and it should be at least 1", k=-3, **options)
    refused(op, scores, r"k is 2.5, and it should be a whole number.*give an int", k=2.5, **options)
    refused(op, scores | {"k": a("int32")}, r"k is .*known when the program is made", **options)
    row = {"scores": a("float32", T, S)}
    refused(op, row, r"scores is float32\[37, 90\], and it should be \[B, T, S\]", k=3, **options)
    whole = {"scores": a("int32", B, T, S)}
    refused(op, whole, r"scores is int32\[2, 37, 90\].*bfloat16 or float32", k=3, **options)
    for number in (5, np.int64(5), S + 1):
        jax.eval_shape(lambda arrays: op(**arrays, k=number, **options), scores)  # noqa: B023


@pytest.mark.parametrize("implementation", ["tpu", "gpu"], indirect=True)
def test_kernels_have_no_float64(implementation):
    sentence = r"{} is float64.*kernels compute in float32 at most.*implementation='reference'"
    options = {"implementation": implementation}
    wide = {name: a("float64", *array.shape) for name, array in ATTENTION.items()}
    selection = a("uint32", B, 2, S) if implementation == "tpu" else a("int32", B, T, K)
    refused(
        sparse_mla, wide | {"selection": selection}, sentence.format("q"), latent_dim=C, scale=1.0, **options
    )
    refused(index_scores, SCORES | {"w": a("float64", B, T, N)}, sentence.format("w"), **options)
    refused(select, {"scores": a("float64", B, T, S)}, sentence.format("scores"), k=3, **options)


@pytest.mark.parametrize("implementation", ["gpu"], indirect=True)
def test_rows_too_wide_for_a_gpu(implementation):
    """The released model's fit in bfloat16 alone; others as compiled for an H100."""
    options = {"scale": 1.0, "implementation": implementation}

    def arguments(dtype, width):
        arrays = {"q": a(dtype, B, T, 64, width), "kv": a(dtype, B, S, width)}
        return arrays | {"selection": a("int32", B, T, K)}

    sentence = r"rows are 512 \+ 64 wide in float32.*memory for 320: use bfloat16, narrower ones"
    refused(sparse_mla, arguments("float32", 576), sentence, latent_dim=512, **options)
    refused(sparse_mla, arguments("bfloat16", 640), r"rows are 512 \+ 128 wide", latent_dim=512, **options)
    refused(sparse_mla, arguments("bfloat16", 577), r"rows are 513 \+ 64 wide", latent_dim=513, **options)
    for dtype, latent in (("bfloat16", 512), ("float32", 256)):
        jax.eval_shape(
            lambda x, latent=latent: sparse_mla(**x, latent_dim=latent, **options),
            arguments(dtype, latent + 64),
        )


# Within debug mode: indices that are no keys.

Q, KV = (jnp.asarray(normal(i, *shape), jnp.bfloat16) for i, shape in enumerate([(2, 4, 3, 32), (2, 20, 32)]))
GOOD = np.tile(np.array([3, 19, 0, -1, -1], np.int32), (2, 4, 1))
WRONG = {
    "past the last key": (20, r"batch 1, query 2 of the selection has index 20 where there is no such key"),
    "far past": (2**31 - 1, r"batch 1, query 2 .* index 2147483647 where there is no such key"),
    "below -1": (-2, r"batch 1, query 2 of the selection has index -2 where there is no such key"),
    "twice": (3, r"batch 1, query 2 of the selection has index 3 twice: indices are from 0 to 19, or -1"),
}


def with_index(index: int) -> np.ndarray:
    indices = GOOD.copy()
    indices[1, 2, 4] = index
    return indices


def attend(indices, implementation):
    return sparse_mla(Q, KV, indices, latent_dim=24, scale=0.2, implementation=implementation)


reads_lists = pytest.mark.parametrize("implementation", ["reference", "gpu"], indirect=True)


@reads_lists
@pytest.mark.parametrize("name", WRONG)
def test_debug_mode_names_the_index(implementation, name):
    """A list that is known is refused as other arguments are; one within jit as the program comes to it."""
    index, sentence = WRONG[name]
    with debug():
        with pytest.raises(UnsupportedError, match=f"^sparse_mla: {sentence}"):
            attend(with_index(index), implementation)
        with pytest.raises(jax.errors.JaxRuntimeError, match=f"UnsupportedError: sparse_mla: {sentence}"):
            jax.block_until_ready(jax.jit(attend, static_argnums=1)(with_index(index), implementation))


@reads_lists
def test_debug_mode_changes_nothing_that_is_right(implementation):
    """Nor a gradient, through jit, rematerialisation and a scan."""

    def total(q, indices):
        def step(carry, _):
            o, _ = sparse_mla(q, KV, indices, latent_dim=24, scale=0.2, implementation=implementation)
            return carry + jnp.sum(o.astype(jnp.float32)), None

        return jax.lax.scan(jax.checkpoint(step), 0.0, length=2)[0]

    plain = jax.jit(jax.grad(total))(Q, GOOD)
    with debug():
        checked = jax.jit(jax.grad(total))(Q, GOOD)
    np.testing.assert_array_equal(np.asarray(plain, np.float32), np.asarray(checked, np.float32))


def test_debug_mode_is_off_by_default_and_then_not_in_the_program():
    program = jax.jit(lambda indices: attend(indices, "reference"))
    assert "callback" not in program.lower(GOOD).as_text()
    with debug():
        assert "callback" in program.lower(GOOD).as_text()


def test_a_mask_has_no_wrong_index():
    """Debug mode has nothing to look for in it."""
    mask = pack_mask(jnp.ones((2, 4, 20), bool))

    def program() -> str:
        return str(jax.make_jaxpr(lambda mask: attend(mask, "tpu"))(mask))

    with interpreted("tpu"):
        plain = program()
        with debug():
            assert program() == plain


def stops(op, sentence: str, *arguments, in_jit: bool = False, **options) -> None:
    """A call with numbers that are known, or a program that comes to them."""
    error, before = (jax.errors.JaxRuntimeError, "UnsupportedError: ") if in_jit else (UnsupportedError, "^")

    def call(*arguments):
        return op(*arguments, **options)

    with debug(), pytest.raises(error, match=before + sentence):
        jax.block_until_ready((jax.jit(call) if in_jit else call)(*arguments))


def test_debug_mode_names_the_expert():
    x, weights = jnp.ones((4, 8)), jnp.ones((4, 2))
    matrices = jnp.ones((3, 8, 16)), jnp.ones((3, 8, 16)), jnp.ones((3, 16, 8))
    experts = np.array([[0, 1], [2, 0], [1, 2], [0, 2]], np.int32)
    plain = expert_mlp(x, experts, weights, *matrices)
    with debug():
        np.testing.assert_array_equal(expert_mlp(x, experts, weights, *matrices), plain)
        alone = expert_mlp(
            x, np.where(experts == 1, 1, 3).astype(np.int32), weights, *matrices
        )  # 3 is nobody
        np.testing.assert_array_equal(alone, np.where(np.any(experts == 1, axis=1)[:, None], plain / 2, 0))
    for wrong, sentence in (
        ((1, 4), r"expert_mlp: experts\[2\] has 4, and it should have numbers from 0 to 2, or 3 for none"),
        ((-1, 1), r"expert_mlp: experts\[2\] has -1, and it should"),
        ((1, 1), r"expert_mlp: experts\[2\] has 1 twice, and it should have numbers from 0 to 2, each once"),
    ):
        experts[2] = wrong
        stops(expert_mlp, sentence, x, experts, weights, *matrices)
    stops(expert_mlp, sentence, x, experts, weights, *matrices, in_jit=True)


def test_debug_mode_names_the_group():
    rows, matrices = jnp.ones((10, 4)), jnp.ones((3, 4, 5))
    for sizes, sentence in (
        ([5, 4, 2], r"grouped_matmul: with sizes\[2\] the groups come to 11 rows, and there are 10"),
        ([5, -1, 2], r"grouped_matmul: with sizes\[1\] the groups come to 4 rows"),
    ):
        stops(grouped_matmul, sentence, rows, matrices, np.array(sizes, np.int32))
    with debug():
        assert grouped_matmul(rows, matrices, np.array([5, 0, 5], np.int32)).shape == (10, 5)


@pytest.mark.parametrize("implementation", ["reference", "tpu", "gpu"], indirect=True)
def test_debug_mode_names_the_page(implementation):
    """Entries that nobody reads may hold anything."""
    options = {"implementation": implementation}
    cache = empty(4, 32, latent_dim=C, rope_dim=R, index_dim=J, **options)
    number, table = np.array([[40], [-1]], np.int32), np.array([[3, 1, 99], [-7, 99, 99]], np.int32)
    scored = jnp.ones((2, 1, N, J), jnp.bfloat16), jnp.ones((2, 1, N)), cache
    mask, indices = np.zeros((2, 1, 96), bool), np.full((2, 1, 2), -1, np.int32)
    mask[0, 0, [0, 40]], indices[0, 0] = True, (0, 40)
    selection = pack_mask(jnp.asarray(mask)) if implementation == "tpu" else indices
    attended = jnp.ones((2, 1, H, C + R), jnp.bfloat16), cache
    how = {"latent_dim": C, "scale": 0.1, **options}
    new = [jnp.ones((2, 1, width), jnp.bfloat16) for width in (C, R, J)]
    with debug():  # with numbers that are known, so that they are looked at
        assert paged_index_scores(*scored, table, number, **options).shape == (2, 1, 96)
        assert paged_sparse_mla(*attended, table, selection, **how)[0].shape == (2, 1, H, C)
        assert write(cache, table, number, *new).page_size == 32
    sentence = r"paged_index_scores: number\[0\] has 96, and it should have numbers from -1 to 95"
    stops(paged_index_scores, sentence, *scored, table, np.array([[96], [-1]], np.int32), **options)
    stops(write, r"write: number\[0\] has 96, and it", cache, table, np.array([[96], [-1]], np.int32), *new)
    for page in (-1, 4):
        table[0, 1] = page
        stops(write, rf"write: page_table\[0, 1\] is {page} and in use", cache, table, number, *new)
        sentence = rf"\w+: page_table\[0, 1\] is {page} and in use, and pages are from 0 to 3"
        stops(paged_index_scores, sentence, *scored, table, number, **options)
        stops(paged_sparse_mla, sentence, *attended, table, selection, **how)
    if implementation == "reference":
        stops(paged_index_scores, sentence, *scored, table, number, **options, in_jit=True)
        stops(paged_sparse_mla, sentence, *attended, table, selection, **how, in_jit=True)

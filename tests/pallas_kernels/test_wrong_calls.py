"""What operations are called with, an argument at a time wrong: from every implementation a sentence that names it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusals import a, refused

from pallas_kernels.decode.api import decode_attention, paged_index_scores, paged_sparse_mla, write
from pallas_kernels.decode.cache import empty
from pallas_kernels.dense_mla.api import dense_mla
from pallas_kernels.expert_mlp.api import expert_mlp
from pallas_kernels.fp8_matmul.api import fp8_matmul
from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.indexer.api import index_scores
from pallas_kernels.indexer_loss.api import dense_indexer_loss, sparse_indexer_loss
from pallas_kernels.platform import UnsupportedError
from pallas_kernels.sparse_mla.api import sparse_mla
from pallas_kernels.visibility import Visibility

on_every_platform = pytest.mark.parametrize("implementation", ["reference", "tpu", "gpu"], indirect=True)
B, T, H, C, R, N, J, S, K = 2, 37, 3, 24, 8, 5, 16, 90, 7
E4M3 = jnp.float8_e4m3fn
LIMITS = Visibility(a("int32", B, T), a("int32", B, T), a("int32", B, S))
SCORES = {"q": a("bfloat16", B, T, N, J), "k": a("bfloat16", B, S, J), "w": a("float32", B, T, N)}
ATTENTION = {"q": a("bfloat16", B, T, H, C + R), "kv": a("bfloat16", B, S, C + R)}
PAGES, PAGE, TABLE = 30, 32, 6  # of the cache, tokens of a page, pages of a sequence
MATRIX = {"x": a(E4M3, 4, 300), "x_scale": a("float32", 4, 3), "w": a(E4M3, 300, 170)}
EXPERTS = {"x": a("bfloat16", T, C), "experts": a("int32", T, 3), "weights": a("float32", T, 3)}
MATRICES = {"gate": (C, 40), "up": (C, 40), "down": (40, C)}
MHA = {"q": a("bfloat16", B, H, T, J), "k": a("bfloat16", B, H, S, J)}
MASK, LSE, SCALE = a("uint32", B, 2, S), a("float32", B, H, T), {"scale": 0.1}
INDEX = {"index_q": SCORES["q"], "index_k": SCORES["k"], "index_w": SCORES["w"]}
PAGED = {"page_table": a("int32", B, TABLE), "number": a("int32", B, 2)}
PAGED_SCORES = {"q": a("bfloat16", B, 2, N, J), "w": a("float32", B, 2, N), **PAGED}
PAGED_ATTENTION = {"q": a("bfloat16", B, 2, H, C + R), "page_table": PAGED["page_table"]}
DECODE = {"index_q": PAGED_SCORES["q"], "index_w": PAGED_SCORES["w"], **PAGED_ATTENTION, **PAGED}
NEW = {"c": a("bfloat16", B, 2, C), "k_pe": a("bfloat16", B, 2, R), "index_key": a("bfloat16", B, 2, J)}
FITS = {
    "dense_mla": (dense_mla, {**MHA, "v": a("bfloat16", B, H, S, C), "visibility": LIMITS, "selected": MASK, **SCALE}),
    "dense_indexer_loss": (
        dense_indexer_loss,
        {"scores": a("float32", B, T, S), **MHA, "lse": LSE, "visibility": LIMITS, "selected": MASK, **SCALE},
    ),
    "sparse_indexer_loss": (sparse_indexer_loss, {**INDEX, **ATTENTION, "lse": a("float32", B, T, H), **SCALE}),
    "sparse_mla": (sparse_mla, {**ATTENTION, "latent_dim": C, **SCALE}),
    "expert_mlp": (expert_mlp, EXPERTS | {name: a("bfloat16", 6, *size) for name, size in MATRICES.items()}),
    "expert_mlp of a stack": (
        expert_mlp,
        {**EXPERTS, **{name: a("bfloat16", 4, 6, *size) for name, size in MATRICES.items()}, "layer": a("int32")},
    ),
    "grouped_matmul": (
        grouped_matmul,
        {"rows": a("bfloat16", T, C), "matrices": a("bfloat16", 5, C, J), "sizes": a("int32", 5)},
    ),
    "fp8_matmul": (fp8_matmul, {**MATRIX, "w_scale": a("float32", 3, 2)}),
    "paged_index_scores": (paged_index_scores, PAGED_SCORES),
    "paged_sparse_mla": (paged_sparse_mla, {**PAGED_ATTENTION, "latent_dim": C, **SCALE}),
    "decode_attention": (decode_attention, {**DECODE, "k": 9, "latent_dim": C, **SCALE}),
    "write": (write, {**PAGED, **NEW}),
}  # fmt: skip
WHOLE, FLOAT = "a whole number, known when the program is made", "a number, known when the program is made"
WRONG_CALLS = [
    ("dense_mla", {"q": a("bfloat16", B, 1, T, J)}, r"k is bfloat16\[2, 3, 90, 16\].*H = 1 as in q"),
    ("dense_mla", {"v": a("bfloat16", B, H, 91, C)}, r"v is bfloat16\[2, 3, 91, 24\].*S = 90 as in k"),
    ("dense_mla", {"v": a("float32", B, H, S, C)}, r"v is float32.*should be bfloat16 as q is"),
    ("dense_mla", {name: a("float16", B, H, n, J) for name, n in (("q", T), ("k", S), ("v", S))}, r"q is float16"),
    ("dense_mla", {"visibility": LIMITS._replace(query_index=a("int32", 1, T))}, r"visibility.query_index.*B = 2"),
    ("dense_mla", {"visibility": LIMITS._replace(key_segment=a("int64", B, S))}, r"visibility.key_segment is int64"),
    ("dense_mla", {"selected": a("uint32", 1, 2, S)}, r"selected is uint32\[1, 2, 90\].*B = 2 as in q"),
    ("dense_mla", {"selected": a("uint32", B, 1, S)}, r".*packed mask, uint32\[B, 2, 90\].*given uint32\[2, 1, 90\]"),
    ("dense_mla", {"selected": a("bool", B, T, S)}, r".*packed mask.*given bool\[2, 37, 90\]"),
    ("dense_mla", {"k": None}, r"k is None, and it should be an array \[B, H, S, Q\]"),
    ("dense_mla", {"k": [1.0]}, r"k is a list, and it should be an array"),
    ("dense_mla", {"scale": a("float32")}, rf"scale is float32\[\], and it should be {FLOAT}: give a float"),
    ("dense_mla", {"scale": "0.1"}, rf"scale is '0.1', and it should be {FLOAT}"),
    ("dense_mla", {"scale": float("nan")}, r"scale is nan, and it should be finite"),
    ("dense_indexer_loss", {"lse": a("float32", B, T, H)}, r"lse is float32\[2, 37, 3\].*H = 3 as in q"),
    ("dense_indexer_loss", {"lse": a("float64", B, H, T)}, r"lse is float64\[2, 3, 37\], and"),
    ("dense_indexer_loss", {"scores": a("float32", B, T, 1)}, r"scores is float32\[2, 37, 1\].*S = 90 as in k"),
    ("dense_indexer_loss", {"scores": a("int32", B, T, S)}, r"scores is int32.*bfloat16 or float32"),
    ("dense_indexer_loss", {"k": a("float32", B, H, S, J)}, r"k is float32.*should be bfloat16 as q is"),
    ("dense_indexer_loss", {"selected": a("uint32", 1, 2, S)}, r"selected is uint32\[1, 2, 90\].*B = 2"),
    ("dense_indexer_loss", {"visibility": LIMITS._replace(key_segment=a("int32", B, 1))}, r"visibility.key_segment"),
    ("dense_indexer_loss", {"scale": None}, rf"scale is None, and it should be {FLOAT}"),
    ("sparse_indexer_loss", {"lse": a("float32", B, T, 1)}, r"lse is float32\[2, 37, 1\].*H = 3 as in q"),
    ("sparse_indexer_loss", {"index_k": a("bfloat16", B, 91, J)}, r"kv is bfloat16\[2, 90, 32\].*S = 91 as in index_k"),
    ("sparse_indexer_loss", {"index_k": a("float32", B, S, J)}, r"index_k is float32.*bfloat16 as index_q is"),
    ("sparse_indexer_loss", {"kv": a("float32", B, S, C + R)}, r"kv is float32.*bfloat16 as q is"),
    ("sparse_indexer_loss", {"index_w": a("int32", B, T, N)}, r"index_w is int32.*bfloat16 or float32"),
    ("sparse_indexer_loss", {"selection": a("int64", B, T, K)}, r"selection is int64.*list of indices"),
    ("sparse_indexer_loss", {"selection": a("int32", B, T, 0)}, r"selection is int32\[2, 37, 0\].*list of indices"),
    ("sparse_indexer_loss", {"selection": None}, r"selection is None, and it should be a list"),
    ("sparse_indexer_loss", {"scale": 1j}, rf"scale is 1j, and it should be {FLOAT}"),
    ("expert_mlp", {"weights": a("float32", T, 1)}, r"weights is float32\[37, 1\].*K = 3 as in experts"),
    ("expert_mlp", {"experts": a("int32", T, 1)}, r"weights is float32\[37, 3\].*K = 1 as in experts"),
    ("expert_mlp", {"up": a("bfloat16", 6, C, 1)}, r"up is bfloat16\[6, 24, 1\].*F = 40 as in gate"),
    ("expert_mlp", {"down": a("bfloat16", 5, 40, C)}, r"down is bfloat16\[5, 40, 24\].*E = 6 as in gate"),
    ("expert_mlp", {"experts": a("float32", T, 3)}, r"experts is float32\[37, 3\], and it should be int32"),
    ("expert_mlp", {"x": a("float64", T, C)}, r"x is float64\[37, 24\], and it should be bfloat16 or float32: cast it"),
    ("expert_mlp", {"up": a(E4M3, 6, C, 40)}, r"up is float8_e4m3fn.*should be bfloat16 or float32"),
    ("expert_mlp", {"layer": a("int32")}, r"gate is bfloat16\[6, 24, 40\], and it should be \[L, E, D, F\]"),
    ("expert_mlp of a stack", {"layer": None}, r"gate is bfloat16\[4, 6, 24, 40\], and it should be \[E, D, F\]"),
    ("expert_mlp of a stack", {"up": a("bfloat16", 3, 6, C, 40)}, r"up is .*L = 4 as in gate"),
    ("expert_mlp of a stack", {"layer": a("int32", 1)}, r"layer is int32\[1\], and it should be \[\]"),
    ("expert_mlp of a stack", {"layer": a("float32")}, r"layer is float32\[\], and it should be int32"),
    ("grouped_matmul", {"rows": a("bfloat16", C)}, r"rows is bfloat16\[24\], and it should be \[M, K\]"),
    ("grouped_matmul", {"matrices": a("bfloat16", 5, J, C)}, r"matrices is bfloat16\[5, 16, 24\].*K = 24 as in rows"),
    ("grouped_matmul", {"sizes": a("int32", 1)}, r"sizes is int32\[1\].*G = 5 as in matrices"),
    ("grouped_matmul", {"sizes": a("float32", 5)}, r"sizes is float32\[5\], and it should be int32"),
    ("grouped_matmul", {"out_dtype": jnp.int32}, r"out_dtype is int32, and it should be bfloat16 or float32"),
    ("fp8_matmul", {"x": None}, r"x is None, and it should be an array"),
    ("fp8_matmul", {"x_scale": a("float32", 1, 3)}, r"x_scale is float32\[1, 3\].*B0 = 4 as in x"),
    ("fp8_matmul", {"w": a(E4M3, 300)}, r"w is float8_e4m3fn\[300\], and it should be \[K, N\]"),
    ("fp8_matmul", {"w_scale": a("float32", 3)}, r"w_scale is float32\[3\], and it should be \[k, n\]"),
    ("fp8_matmul", {"w_scale": a("float32", 3), "transposed": True}, r"w_scale .* should be \[n, k\]"),
    ("fp8_matmul", {"out_dtype": "e4m3"}, r"out_dtype is e4m3, and it should be bfloat16 or float32"),
    ("paged_index_scores", {"w": a("float32", B, 2, 1)}, r"w is float32\[2, 2, 1\].*N = 5 as in q"),
    ("paged_index_scores", {"q": a("bfloat16", B)}, r"q is bfloat16\[2\], and it should be \[B, T, N, J\]"),
    ("paged_index_scores", {"q": a("bfloat16", B, 2, N, 200)}, r"q is 200 wide, and the cache holds"),
    ("paged_index_scores", {"q": a("float16", B, 2, N, J)}, r"q is float16"),
    ("paged_index_scores", {"w": a("int32", B, 2, N)}, r"w is int32.*bfloat16 or float32"),
    ("paged_index_scores", {"number": a("int32", B, 1)}, r"number is int32\[2, 1\].*T = 2 as in q"),
    ("paged_index_scores", {"number": a("int64", B, 2)}, r"number is int64\[2, 2\], and it should be int32"),
    ("paged_index_scores", {"page_table": a("int64", B, TABLE)}, r"page_table is int64\[2, 6\].* int32"),
    ("paged_sparse_mla", {"page_table": a("int32", 1, TABLE)}, r"page_table is int32\[1, 6\].*B = 2 as in q"),
    ("paged_sparse_mla", {"q": a("float16", B, 2, H, C + R)}, r"q is float16"),
    ("paged_sparse_mla", {"latent_dim": C + R}, r"latent_dim is 32, and rows are 32 wide"),
    ("paged_sparse_mla", {"latent_dim": 24.5}, rf"latent_dim is 24.5, and it should be {WHOLE}"),
    ("paged_sparse_mla", {"scale": float("inf")}, r"scale is inf, and it should be finite"),
    ("paged_sparse_mla", {"selection": a("int32", 1, 2, 9)}, r"selection is int32\[1, 2, 9\].*in a batch of 2"),
    ("paged_sparse_mla", {"selection": a("uint32", B, 1, 191)}, r".*packed mask, uint32\[B, 1, 192\]"),
    ("write", {"number": a("int32", B, 1)}, r"c is bfloat16\[2, 2, 24\].*T = 1 as in number"),
    ("write", {"number": a("int64", B, 2)}, r"number is int64\[2, 2\], and it should be int32"),
    ("write", {"k_pe": a("bfloat16", B, 2)}, r"k_pe is bfloat16\[2, 2\], and it should be \[B, T, O\]"),
    ("write", {"c": a("bfloat16", B, 2, 600)}, r"(the latent is 600 wide|rows of the cache have \d+ words)"),
    ("write", {"index_key": a("bfloat16", B, 2, 200)}, r"index_key is 200 wide, and the cache holds"),
    ("decode_attention", {"k": 0}, r"k is 0, and it should be at least 1"),
    ("decode_attention", {"index_w": a("float32", B, 2, 1)}, r"index_w is float32\[2, 2, 1\].*N = 5 as in index_q"),
    ("decode_attention", {"q": a("bfloat16", B, 1, H, C + R)}, r"index_q is .*T = 1 as in q"),
]  # fmt: skip


def arguments_of(name: str, implementation: str, changes: dict):
    """The operation, and arrays and options with the changes."""
    op, arguments = FITS[name]
    if op in (paged_index_scores, paged_sparse_mla, decode_attention, write):
        arguments = arguments | {"cache": cache_of(implementation)}
    if op in (sparse_indexer_loss, sparse_mla, paged_sparse_mla):
        queries, keys = (2, TABLE * PAGE) if op is paged_sparse_mla else (T, S)
        mask, indices = a("uint32", B, -(-queries // 32), keys), a("int32", B, queries, K)
        arguments = arguments | {"selection": mask if implementation == "tpu" else indices}
    arguments = arguments | changes | ({} if op is write else {"implementation": implementation})
    leaves = {name: jax.tree.leaves(x) for name, x in arguments.items()}
    arrays = {
        n: x for n, x in arguments.items() if leaves[n] and isinstance(leaves[n][0], jax.ShapeDtypeStruct)
    }
    return op, arrays, {n: x for n, x in arguments.items() if n not in arrays}


def cache_of(implementation: str, **widths):
    widths = {"latent_dim": C, "rope_dim": R, "index_dim": J} | widths
    return jax.eval_shape(lambda: empty(PAGES, PAGE, **widths, implementation=implementation))


@on_every_platform
@pytest.mark.parametrize(("name", "changes", "sentence"), WRONG_CALLS)
def test_wrong_calls(implementation, name, changes, sentence):
    op, arrays, options = arguments_of(name, implementation, changes)
    refused(op, arrays, sentence, **options)


@on_every_platform
@pytest.mark.parametrize("op", [index_scores, dense_mla])
def test_a_mask_is_no_visibility(implementation, op):
    arrays = dict(SCORES) if op is index_scores else dict(FITS["dense_mla"][1])
    scale = {"scale": arrays.pop("scale")} if "scale" in arrays else {}
    with pytest.raises(
        UnsupportedError,
        match=rf"^{op.__name__}: visibility is bool\[2, 37, 90\], and it should be a .*Visibility",
    ):
        jax.eval_shape(
            lambda x: op(**x, **scale, implementation=implementation),
            arrays | {"visibility": a("bool", B, T, S)},
        )


@on_every_platform
@pytest.mark.parametrize("name", FITS)
def test_programs_may_count_in_64_bits(implementation, name):
    op, arrays, options = arguments_of(name, implementation, {})
    with jax.enable_x64():
        found = jax.eval_shape(lambda x: op(**x, **options), arrays)
    assert {x.dtype.itemsize for x in jax.tree.leaves(found)} <= {2, 4}


@on_every_platform
@pytest.mark.parametrize(
    "name", ["dense_mla", "dense_indexer_loss", "sparse_indexer_loss", "sparse_mla", "paged_sparse_mla"]
)
@pytest.mark.parametrize("number", [np.float64, jnp.float32])
def test_numbers_may_be_of_any_kind(implementation, name, number):
    """Where jax counts in 64 bits, a scale in 64 would widen what it multiplies."""
    numbers = {"scale": number(0.1)} | ({"latent_dim": np.int64(C)} if "sparse_mla" in name else {})
    op, arrays, options = arguments_of(name, implementation, numbers)
    with jax.enable_x64():
        found = jax.eval_shape(lambda x: op(**x, **options), arrays)
    assert jax.tree.leaves(found)[-1].dtype == jnp.float32


@on_every_platform
def test_a_cache_that_does_not_fit(implementation):
    options = {"latent_dim": C, "scale": 1.0, "implementation": implementation}
    _, arrays, _ = arguments_of("paged_sparse_mla", implementation, {})
    for widths in ({"latent_dim": 600}, {"rope_dim": 200}):
        sentence = r"(rows of the cache have \d+ words|the (latent|rotary part) is \d+ wide)"
        refused(paged_sparse_mla, arrays | {"cache": cache_of(implementation, **widths)}, sentence, **options)
    for changes, sentence in (
        ({"index_key": a("float16", *arrays["cache"].index_key.shape)}, r"cache.index_key is float16"),
        (
            {"index_scale": a("float32", PAGES, PAGE)},
            r"cache.index_scale is float32, and it should be None, as",
        ),
    ):
        refused(
            paged_sparse_mla, arrays | {"cache": arrays["cache"]._replace(**changes)}, sentence, **options
        )
    layers = jax.tree.map(lambda x: a(x.dtype, 3, *x.shape), arrays["cache"])
    refused(paged_sparse_mla, arrays | {"cache": layers}, r"cache\.\w+ is \w+\[3, 30, 32, \d+\]", **options)


@pytest.mark.parametrize("implementation", ["tpu", "gpu"], indirect=True)
@pytest.mark.parametrize(
    "name", ["dense_mla", "dense_indexer_loss", "sparse_indexer_loss", "paged_sparse_mla"]
)
def test_other_kernels_have_no_float64(implementation, name):
    op, arrays, options = arguments_of(name, implementation, {})
    wide = {
        n: a("float64", *x.shape) if getattr(x, "dtype", 0) == jnp.bfloat16 else x for n, x in arrays.items()
    }
    sentence = r"\w+ is float64.*kernels compute in float32 at most.*implementation='reference'"
    refused(op, wide, sentence, **options)

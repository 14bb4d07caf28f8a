"""Decoding over a paged cache against the formulas in float64, densely, on the numbers that the cache holds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from e4m3 import dequantised, e4m3_bytes, quantised
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from numerics import normal, quick_jit, relative
from visible import everyone, packed, softmax

from pallas_kernels.decode import cache as paged
from pallas_kernels.decode import gpu
from pallas_kernels.decode.api import decode_attention, paged_index_scores, paged_sparse_mla, write
from pallas_kernels.decode.listing import entries_shape, list_set, rows_at_a_time
from pallas_kernels.indexer.api import index_scores
from pallas_kernels.platform import UnsupportedError, interpreted
from pallas_kernels.sparse_mla.api import sparse_mla

SCALE = 0.2
PAGE = 64
LATENT, ROPE, HEADS = 24, 8, 3
INDEX, INDEX_HEADS = 16, 5
WIDTHS = {"latent_dim": LATENT, "rope_dim": ROPE, "index_dim": INDEX}
LENGTHS = (0, 1, 37, 150, 128)  # nothing, one token, off the page, several pages, exactly two
scores_of = quick_jit(paged_index_scores, static_argnames="implementation")
attend = quick_jit(paged_sparse_mla, static_argnames=("latent_dim", "scale", "implementation"))
decode = quick_jit(decode_attention, static_argnames=("k", "latent_dim", "scale", "implementation"))
insert = quick_jit(write)
unpaged_scores = quick_jit(functools.partial(index_scores, implementation="reference"))
unpaged_attend = quick_jit(
    functools.partial(sparse_mla, latent_dim=LATENT, scale=SCALE, implementation="reference")
)
on_every_platform = pytest.mark.parametrize("implementation", ["reference", "tpu", "gpu"], indirect=True)
how_many_in_what = pytest.mark.parametrize(
    ("queries", "dtype"), [(1, jnp.bfloat16), (4, paged.E4M3)], ids=["1-bf16", "4-e4m3"]
)
in_both_precisions = pytest.mark.parametrize("dtype", [jnp.bfloat16, paged.E4M3], ids=["bf16", "e4m3"])


def rounded(x: np.ndarray) -> np.ndarray:
    """To bfloat16."""
    return np.asarray(jnp.asarray(x, jnp.float32).astype(jnp.bfloat16), np.float64)


def quantised_latent(c: np.ndarray) -> np.ndarray:
    """What a cache in e4m3 holds of latents, from the definition."""
    scale = (np.abs(c).max(-1, keepdims=True) / np.float32(448)).astype(np.float32)
    scale = np.where(scale > 0, scale, 1)
    codes = e4m3_bytes((c / scale).astype(np.float64))
    return rounded(dequantised(codes, scale.astype(np.float64)))


class Case:
    """Sequences in pages of a shuffled order; what was not written is NaN, and unused entries point nowhere."""

    def __init__(self, implementation: str, dtype, queries: int, lengths=LENGTHS, k: int = 20, seed: int = 0):
        self.implementation, self.lengths, self.k = implementation, np.array(lengths), k
        batch, self.pages = len(lengths), -(-max(lengths) // PAGE) + 1
        self.keys = self.pages * PAGE
        self.c = normal(seed, batch, self.keys, LATENT)
        self.k_pe, self.index_key = normal(1, batch, self.keys, ROPE), normal(2, batch, self.keys, INDEX)
        self.q = jnp.asarray(normal(3, batch, queries, HEADS, LATENT + ROPE), jnp.bfloat16)
        self.index_q = jnp.asarray(normal(4, batch, queries, INDEX_HEADS, INDEX), jnp.bfloat16)
        self.index_w = jnp.asarray(normal(5, batch, queries, INDEX_HEADS))
        self.number = self.lengths[:, None] - queries + np.arange(queries)[None]
        self.number = np.maximum(self.number, -1).astype(np.int32)
        self.table = self.make_table(batch, seed)
        self.cache = self.fill(dtype)
        self.kv = np.concatenate([rounded(self.c), rounded(self.k_pe)], -1)
        self.keys_held = rounded(self.index_key)
        if dtype == paged.E4M3:
            self.kv[..., :LATENT] = quantised_latent(self.c)
            self.keys_held = dequantised(*quantised(self.index_key))

    def make_table(self, batch: int, seed: int) -> np.ndarray:
        """The last two sequences share their first page."""
        order = np.random.RandomState(seed).permutation(batch * self.pages).reshape(batch, self.pages)
        if batch > 1 and min(self.lengths[-2:]) >= PAGE:
            order[-1, 0] = order[-2, 0]
            for x in (self.c, self.k_pe, self.index_key):
                x[-1, :PAGE] = x[-2, :PAGE]
        unused = np.arange(self.pages) >= -(-self.lengths[:, None] // PAGE)
        return np.where(unused, np.where(np.arange(self.pages) % 2, -7, 10**6), order).astype(np.int32)

    def fill(self, dtype):
        """All but the last tokens at once, then one after another, as an engine does; beginning with NaN."""
        cache = paged.empty(self.table.size, PAGE, **WIDTHS, dtype=dtype, implementation=self.implementation)
        cache = jax.tree.map(lambda x: jnp.full_like(x, -1 if x.dtype == jnp.int32 else jnp.nan), cache)
        first = np.maximum(self.lengths - 2, 0)
        number = np.broadcast_to(np.arange(self.keys, dtype=np.int32), (len(self.lengths), self.keys))
        rows = self.c, self.k_pe, self.index_key
        cache = insert(cache, self.table, np.where(number < first[:, None], number, -1), *rows)
        for step in range(2):
            place = first + step
            number = np.where(place < self.lengths, place, -1).astype(np.int32)[:, None]
            new = (x[np.arange(len(x)), np.minimum(place, self.keys - 1)][:, None] for x in rows)
            cache = insert(cache, self.table, number, *new)
        return cache

    @property
    def visible(self) -> np.ndarray:
        """[B, T, S]"""
        return np.arange(self.keys) <= self.number[..., None]

    def scores(self) -> np.ndarray:
        """By the formula."""
        q, w = np.asarray(self.index_q, np.float64), np.asarray(self.index_w, np.float64)
        products = np.maximum(np.einsum("btnj,bsj->btns", q, self.keys_held), 0)
        return np.where(self.visible, np.einsum("btn,btns->bts", w, products), -np.inf)

    def mask(self) -> np.ndarray:
        """k random visible keys a query."""
        order = np.random.RandomState(9).uniform(size=self.visible.shape) - 2.0 * self.visible
        return (np.argsort(np.argsort(order, -1), -1) < self.k) & self.visible

    def selection(self, mask: np.ndarray) -> np.ndarray:
        """As this implementation reads it."""
        if self.implementation == "tpu":
            return packed(mask)
        indices = np.full((*mask.shape[:2], self.k), -1, np.int32)
        for b, t in np.ndindex(mask.shape[:2]):
            chosen = np.flatnonzero(mask[b, t])
            indices[b, t, : chosen.size] = chosen
        return indices

    def attention(self, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """o and lse, densely."""
        scores = SCALE * np.einsum("bthx,bsx->bths", np.asarray(self.q, np.float64), self.kv)
        p, lse = softmax(np.where(mask[:, :, None], scores, -np.inf))
        return np.einsum("bths,bsc->bthc", p, self.kv[..., :LATENT]), lse

    def run(self, mask: np.ndarray):
        return attend(
            self.q,
            self.cache,
            self.table,
            self.selection(mask),
            latent_dim=LATENT,
            scale=SCALE,
            implementation=self.implementation,
        )

    def run_scores(self) -> np.ndarray:
        arrays = self.index_q, self.index_w, self.cache, self.table, self.number
        return np.asarray(scores_of(*arrays, implementation=self.implementation))

    def check_scores(self) -> None:
        """Products of bfloat16 or e4m3 are exact in float32, whose sums are rounded."""
        scores, expected, seen = self.run_scores(), self.scores(), self.visible
        assert (scores.dtype, scores.shape) == (np.float32, seen.shape)
        np.testing.assert_array_equal(scores[~seen], -np.inf)
        assert relative(scores[seen], expected[seen]) < 1e-6


def check(found, expected) -> None:
    """What every backend promises."""
    (o, lse), (expected_o, expected_lse) = found, expected
    assert (o.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    assert relative(o, expected_o) < 5e-3
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)
    assert not np.any(np.asarray(o, np.float32)[np.isneginf(expected_lse)])


@pytest.mark.parametrize("implementation", ["reference", "tpu", "gpu"], indirect=True)
@in_both_precisions
def test_a_cache_holds_what_was_written(implementation, dtype):
    """Bit for bit, whatever the layout; nothing is written for the place -1."""
    case = Case(implementation, dtype, 1)
    written = np.arange(case.keys) < case.lengths[:, None]
    kv, index_key = paged.read(case.cache, case.table, **WIDTHS)
    np.testing.assert_array_equal(np.asarray(kv)[written], case.kv[written])
    np.testing.assert_array_equal(np.asarray(index_key)[written], case.keys_held[written])
    assert np.all(np.isnan(np.asarray(index_key)[3, case.lengths[3] : case.lengths[3] + 5]))


def test_quantisation_of_latents():
    """Four groups of very different size, one of zeros, and the largest number of each kept to its last bit."""
    c = normal(0, 50, 512) * np.repeat([1e-30, 1.0, 0.0, 1e30], 128).astype(np.float32)
    numbers, scale = paged.quantise_latent(jnp.asarray(c))
    groups = c.reshape(50, 4, 128)
    largest = np.abs(groups).max(-1)
    np.testing.assert_allclose(np.asarray(scale)[:, [0, 1, 3]], (largest / 448)[:, [0, 1, 3]], rtol=2e-7)
    assert np.all(np.asarray(scale) > 0)
    held = np.asarray(numbers, np.float64).reshape(50, 4, 128)
    assert not np.any(held[:, 2])
    np.testing.assert_array_equal(np.abs(held).max(-1)[:, [0, 1, 3]], 448)
    codes = e4m3_bytes((groups / np.asarray(scale)[..., None]).astype(np.float64))
    np.testing.assert_array_equal(held, dequantised(codes, np.ones((50, 4))))


@on_every_platform
@how_many_in_what
def test_scores(implementation, dtype, queries):
    Case(implementation, dtype, queries).check_scores()


@pytest.mark.parametrize("implementation", ["gpu"], indirect=True)
@in_both_precisions
def test_scores_of_several_tiles_a_block(implementation, dtype, monkeypatch):
    """As long caches of many sequences have them."""
    monkeypatch.setattr(gpu, "_SPANS", 1)
    Case(implementation, dtype, 2).check_scores()


@on_every_platform
@in_both_precisions
def test_queries_in_e4m3_are_scored_exactly(implementation, dtype):
    """Their scale is in the weights; whatever the cache holds."""
    case = Case(implementation, dtype, 2)
    codes, scale = quantised(np.asarray(case.index_q, np.float64))
    case.index_q = jnp.asarray(dequantised(codes, np.ones_like(scale)), paged.E4M3)
    case.index_w = case.index_w * scale[..., 0]
    case.check_scores()


@on_every_platform
@how_many_in_what
def test_attention(implementation, dtype, queries):
    """Empty slots, sequences with fewer keys than places, a page that two sequences share."""
    case = Case(implementation, dtype, queries)
    mask = case.mask()
    check(case.run(mask), case.attention(mask))


@pytest.mark.slow
@on_every_platform
def test_eight_thousand_keys(implementation):
    """Several tiles of keys and of lists for two queries, and every key of a shorter sequence."""
    case = Case(implementation, paged.E4M3, 2, lengths=(8192, 600), k=640)
    mask = case.mask()
    check(case.run(mask), case.attention(mask))
    case.check_scores()


@pytest.mark.slow
@on_every_platform
def test_decoding_attends_to_the_best(implementation):
    """Scores, selection and attention together; the selection is that of a sort of the scores."""
    case = Case(implementation, jnp.bfloat16, 3)
    scores = case.run_scores()
    rank = np.argsort(np.argsort(-scores, axis=-1, kind="stable"), axis=-1)
    how = {"k": case.k, "latent_dim": LATENT, "scale": SCALE, "implementation": implementation}
    arrays = case.q, case.index_q, case.index_w, case.cache, case.table, case.number
    check(decode(*arrays, **how), case.attention((rank < case.k) & case.visible))
    first = (np.arange(case.keys) < case.k) & case.visible
    no_weights = case.q, case.index_q, jnp.zeros_like(case.index_w), case.cache, case.table, case.number
    check(decode(*no_weights, **how), case.attention(first))


@pytest.mark.parametrize(("keys", "share"), [(500, 0.5), (40000, 1.0), (70000, 0.02), (500, 0.0)])
def test_a_mask_becomes_a_list(keys, share):
    """On TPU, within a kernel: all keys of more than one piece, few of several, none."""
    random = np.random.RandomState(0)
    words = np.where(random.uniform(size=keys) < share, random.randint(1, 256, keys), 0).astype(np.int32)
    padded = np.pad(words, (0, -keys % (128 * rows_at_a_time(keys)))).reshape(-1, 128)
    places = random.permutation(1 << 23)[: padded.size].astype(np.int32).reshape(padded.shape)

    def kernel(words, places, entries, count):
        count[0] = list_set(words, places, entries)

    list_all = pl.pallas_call(
        kernel,
        out_shape=[
            jax.ShapeDtypeStruct(entries_shape(padded.shape[0]), jnp.int32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
        ],
        out_specs=[pl.BlockSpec(memory_space=pltpu.VMEM), pl.BlockSpec(memory_space=pltpu.SMEM)],
        interpret=pltpu.InterpretParams(),
    )
    entries, count = quick_jit(list_all)(padded, places)
    expected = places.reshape(-1)[np.flatnonzero(words)] + (words[words != 0].astype(np.int64) << 23)
    assert count[0] == expected.size
    entries = np.asarray(entries).reshape(-1).view(np.uint32)
    np.testing.assert_array_equal(entries[: expected.size], expected)
    assert not np.any(entries[expected.size :])


@on_every_platform
def test_pages_make_no_difference(implementation):
    """The operations of whole sequences, on the same rows one after another."""
    case = Case(implementation, jnp.bfloat16, 1)
    kv, index_key = (jnp.asarray(x, jnp.bfloat16) for x in (case.kv, case.keys_held))
    limits = everyone(*case.visible.shape)._replace(query_index=case.number)
    scores = np.asarray(unpaged_scores(case.index_q, index_key, case.index_w, limits))
    assert relative(case.run_scores()[case.visible], scores[case.visible]) < 1e-6
    mask, found = case.mask(), case.run(case.mask())
    case.implementation = "reference"
    unpaged = unpaged_attend(case.q, kv, case.selection(mask))
    check(found, [np.asarray(x, np.float64) for x in unpaged])


def test_float32_on_cpus():
    case = Case("reference", jnp.float32, 2)
    case.kv, case.keys_held = np.concatenate([case.c, case.k_pe], -1), case.index_key
    case.q, case.index_q = case.q.astype(jnp.float32) / 3, case.index_q.astype(jnp.float32) / 3
    mask = case.mask()
    (o, lse), (expected_o, expected_lse) = case.run(mask), case.attention(mask)
    assert o.dtype == jnp.float32
    assert relative(o, expected_o) < 1e-6
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6, atol=1e-6)
    case.check_scores()


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["tpu, races looked for"], indirect=True)
def test_copies_are_waited_for(implementation):
    case = Case(implementation, paged.E4M3, 2, lengths=(40, 600), k=560)
    mask = case.mask()
    check(case.run(mask), case.attention(mask))
    case.check_scores()


def test_what_is_refused():
    case = Case("reference", jnp.bfloat16, 1)
    scored = case.index_w, case.cache, case.table, case.number
    nine = jnp.zeros((len(LENGTHS), 9, INDEX_HEADS, INDEX), jnp.bfloat16)
    with pytest.raises(
        UnsupportedError, match="9 queries a sequence were given, and decoding takes at most 8"
    ):
        paged_index_scores(nine, *scored)
    with pytest.raises(UnsupportedError, match=r"page_table is int32\[4, 4\].* B = 5 as in q"):
        paged_index_scores(case.index_q, case.index_w, case.cache, case.table[:4], case.number)
    options = {"latent_dim": LATENT, "scale": SCALE}
    with pytest.raises(UnsupportedError, match=r"list of int32.*given uint32\[5, 1, 256\]"):
        paged_sparse_mla(case.q, case.cache, case.table, packed(case.mask()), **options)
    with pytest.raises(UnsupportedError, match="dtype float16 was given"):
        paged.empty(4, 64, **WIDTHS, dtype=jnp.float16)
    with interpreted("tpu"):
        with pytest.raises(
            UnsupportedError, match="reads a PackedCache, and it was given a Cache: make it with"
        ):
            paged_index_scores(case.index_q, *scored)
        with pytest.raises(UnsupportedError, match="pages of 48 tokens were given"):
            paged.empty(4, 48, **WIDTHS)
        packed_cache = paged.empty(30, PAGE, **WIDTHS)
        with pytest.raises(UnsupportedError, match=r"packed mask, uint32\[B, 1, 256\].*given int32"):
            paged_sparse_mla(case.q, packed_cache, case.table, case.selection(case.mask()), **options)

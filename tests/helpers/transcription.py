"""Attention and indexer of one sequence in float64 numpy, from the formulas of the V3 and V3.2-Exp reports."""

import math

import numpy as np
from e4m3 import dequantised, quantised

from dsjax.models.rope import frequencies


def float64(variable) -> np.ndarray:
    return np.asarray(variable[...], np.float64)


def rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return weight * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def angles_at(positions: np.ndarray, config) -> np.ndarray:
    """[T, R/2]; products of float32 numbers rounded to float32, as in the released code (see test_rope.py)."""
    return (positions[:, None].astype(np.float32) * frequencies(config)).astype(np.float64)


def turn_interleaved(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """The pairs (2i, 2i+1) of x [T, H, R]."""
    result, cos, sin = np.empty_like(x), np.cos(angles)[:, None], np.sin(angles)[:, None]
    result[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
    result[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
    return result


def turn_half(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """The pairs (i, i + half) of x [T, H, R]."""
    a, b = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def hadamard(x: np.ndarray) -> np.ndarray:
    matrix = np.ones((1, 1))
    while len(matrix) < x.shape[-1]:
        matrix = np.kron(np.array([[1, 1], [1, -1]]), matrix)
    return x @ matrix * x.shape[-1] ** -0.5


def softmax(scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Over the last axis; rows without a key are 0."""
    scores = np.where(mask, scores, -np.inf)
    highest = np.max(scores, axis=-1, keepdims=True, initial=-1e300)
    exponentials = np.exp(scores - highest)
    return exponentials / np.maximum(exponentials.sum(-1, keepdims=True), 1e-300)


class IndexerTranscription:
    """q [T, N, J], k [S, J], w [T, N], scores [T, S]; before rounding to e4m3, unrounded_q and unrounded_k."""

    def __init__(self, config, parameters: dict[str, np.ndarray], x, q_latent, positions):
        heads, width = config.index_n_heads, config.index_head_dim
        angles = angles_at(positions, config)
        q = np.einsum("tq,qnj->tnj", q_latent, parameters["wq_b.weight"])
        k = x @ parameters["wk.weight"]
        k = (k - k.mean(-1, keepdims=True)) / np.sqrt(k.var(-1, keepdims=True) + 1e-6)
        k = k * parameters["k_norm.weight"] + parameters["k_norm.bias"]

        def turn_first(x):
            first, rest = np.split(x, [config.qk_rope_head_dim], axis=-1)
            return np.concatenate([turn_half(first, angles), rest], axis=-1)

        self.q, self.k = turn_first(q), turn_first(k[:, None])[:, 0]
        if config.index_precision == "exact":
            self.unrounded_q, self.unrounded_k = hadamard(self.q), hadamard(self.k)
            self.q, self.k = (
                dequantised(*quantised(x.astype(np.float32))) for x in (self.unrounded_q, self.unrounded_k)
            )
        self.w = x @ parameters["weights_proj.weight"] * heads**-0.5
        products = np.einsum("tnj,sj->tsn", self.q, self.k)
        self.scores = np.einsum("tn,tsn->ts", self.w, width**-0.5 * np.maximum(products, 0))


class AttentionTranscription:
    """Multi-head attention of x [T, D] over the keys in ``mask`` [T, S]: u [T, D] and p [H, T, S]."""

    def __init__(self, attn, x: np.ndarray, positions: np.ndarray, mask: np.ndarray):
        config = attn.config
        angles = angles_at(positions, config)
        self.q_latent = rms_norm(x @ float64(attn.q_a_proj.weight), float64(attn.q_a_layernorm.weight))
        q = np.einsum("tq,qhp->thp", self.q_latent, float64(attn.q_b_proj.weight))
        q_nope, q_pe = np.split(q, [config.qk_nope_head_dim], axis=-1)
        c_and_pe = x @ float64(attn.kv_a_proj_with_mqa.weight)
        c, k_pe = np.split(c_and_pe, [config.kv_lora_rank], axis=-1)
        c = rms_norm(c, float64(attn.kv_a_layernorm.weight))
        q_pe, k_pe = turn_interleaved(q_pe, angles), turn_interleaved(k_pe[:, None], angles)[:, 0]
        w_uk, w_uv = np.split(float64(attn.kv_b_proj.weight), [config.qk_nope_head_dim], axis=-1)
        k_nope, v = np.einsum("sc,chp->shp", c, w_uk), np.einsum("sc,chv->shv", c, w_uv)
        m = 0.1 * math.log(40) + 1 if config.max_position_embeddings > 4096 else 1.0
        scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5 * m**2
        scores = np.einsum("thp,shp->hts", q_nope, k_nope) + np.einsum("thr,sr->hts", q_pe, k_pe)
        self.c, self.k_pe = c, k_pe
        self.p = softmax(scale * scores, mask)
        self.u = np.einsum("hts,shv,hvd->td", self.p, v, float64(attn.o_proj.weight))

"""Exact top-k selection, ties to the lowest index."""

from collections.abc import Callable, Mapping

from pallas_kernels import checks
from pallas_kernels.platform import choose
from pallas_kernels.shapes import Array, Float, Int, UInt32
from pallas_kernels.topk import gpu, reference, tpu


def topk_indices(
    scores: Float[Array, "B T S"], k: int, *, implementation: str | None = None
) -> Int[Array, "B T K"]:
    """The keys with the ``k`` highest scores of each query, as a list (``selection``): ascending, -1 behind.

    A score of -inf is no key: a query that sees fewer than k keys selects them all. Equal scores (0.0 and -0.0
    are equal) are taken in order of index, so every platform selects the same. Scores must not be NaN, and are
    compared as float32, whatever their dtype. Not differentiable: selection has no gradient.

    Raises UnsupportedError for arguments that do not fit.

    Source: V3.2-Exp report eq. 2.
    """
    available = {"reference": reference.topk_indices, "tpu": tpu.topk_indices, "gpu": gpu.topk_indices}
    return _run("topk_indices", implementation, available, scores, k)


def topk_mask(
    scores: Float[Array, "B T S"], k: int, *, implementation: str | None = None
) -> UInt32[Array, "B W S"]:
    """The same selection as a packed mask (``selection``)."""
    available = {"reference": reference.topk_mask, "tpu": tpu.topk_mask, "gpu": gpu.topk_mask}
    return _run("topk_mask", implementation, available, scores, k)


def select(
    scores: Float[Array, "B T S"], k: int, *, implementation: str | None = None
) -> Int[Array, "B T K"] | UInt32[Array, "B W S"]:
    """The same selection in the form that ``sparse_mla`` reads on this platform."""
    available = {"reference": reference.topk_indices, "tpu": tpu.topk_mask, "gpu": gpu.topk_indices}
    return _run("select", implementation, available, scores, k)


def _run(
    op: str, implementation: str | None, available: Mapping[str, Callable], scores: Array, k: int
) -> Array:
    chosen = choose(op, implementation, available)
    checks.shapes(op, {"scores": (scores, "B T S")})
    checks.floats(op, {"scores": scores}, kernel=chosen is not available["reference"])
    return chosen(scores, checks.positive(op, "k", k))

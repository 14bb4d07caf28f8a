"""Exact top-k selection, ties to the lowest index, in two forms: a mask and a list of indices."""

from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.platform import choose
from pallas_kernels.topk import reference


def topk_mask(
    scores: Float[Array, "*B S"],
    visible: Bool[Array, "*B S"],
    k: int,
    *,
    implementation: str | None = None,
) -> Bool[Array, "*B S"]:
    """True at the ``k`` highest scores among the visible keys of each row; at all of them where there are fewer.

    Equal scores (0.0 and -0.0 are equal) are taken in order of index, so every row has exactly
    ``min(k, visible)`` keys on every platform. Scores must not be NaN. Not differentiable: selection has no
    gradient.

    Source: V3.2-Exp report eq. 2.
    """
    return choose("topk_mask", implementation, {"reference": reference.topk_mask})(scores, visible, k)


def topk_indices(
    scores: Float[Array, "*B S"],
    visible: Bool[Array, "*B S"],
    k: int,
    *,
    implementation: str | None = None,
) -> Int[Array, "*B K"]:
    """The same selection as int32 indices in ascending order, the places that stay empty filled with -1."""
    return choose("topk_indices", implementation, {"reference": reference.topk_indices})(scores, visible, k)

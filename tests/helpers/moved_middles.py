"""The inverse of moving a middle."""

import numpy as np

from dsjax.data.documents import Controls


def text_of(tokens: np.ndarray, controls: Controls) -> np.ndarray:
    """The text of a whole rendered document, its middle back in its place."""
    inner = tokens[1:-1]
    if not len(inner) or inner[0] != controls.fim_begin:
        return inner
    hole, end = (int(np.flatnonzero(inner == token)[0]) for token in (controls.fim_hole, controls.fim_end))
    return np.concatenate([inner[1:hole], inner[end + 1 :], inner[hole + 1 : end]])

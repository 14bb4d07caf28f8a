"""Loss on held-out text."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from dsjax.data.windows import Batch
from dsjax.models.batch import DeviceBatch
from dsjax.models.cross_entropy import token_nll
from dsjax.models.transformer import Transformer


class HeldoutLoss(NamedTuple):
    """Loss on held-out text, over all its real targets."""

    nats_per_token: float
    bits_per_byte: float
    tokens: int


@jax.jit
def batch_nll(model: Transformer, batch: DeviceBatch) -> Float[Array, "B T"]:
    """Negative log-likelihood of every target in nats; 0 where none counts."""
    hidden = model(batch["tokens"], batch["positions"], batch["segment_ids"], inference=True).hidden
    nll = token_nll(model.norm(hidden), model.lm_head.weight[...], batch["targets"])
    return jnp.where(batch["loss_mask"] > 0, nll, 0)


def heldout_loss(
    model: Transformer, batches: Sequence[Batch], token_bytes: Int32[np.ndarray, "V"]
) -> HeldoutLoss:
    """Cross-entropy over ``batches``, a token and a byte of the text.

    ``token_bytes`` gives the UTF-8 bytes that each token stands for, 0 for control tokens; their loss counts,
    their bytes do not exist. Sums are taken in float64.
    """
    nll, tokens, size_bytes = 0.0, 0, 0
    for batch in batches:
        counts = batch["loss_mask"] > 0
        nll += float(np.sum(np.asarray(batch_nll(model, batch), np.float64)))
        tokens += int(counts.sum())
        size_bytes += int(token_bytes[batch["targets"]][counts].sum())
    return HeldoutLoss(nll / max(tokens, 1), nll / math.log(2) / max(size_bytes, 1), tokens)

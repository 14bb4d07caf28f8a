"""Loss on held-out text."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32

from dsjax.data.windows import Batch
from dsjax.models.batch import DeviceBatch
from dsjax.models.cross_entropy import token_nll
from dsjax.models.transformer import Transformer
from dsjax.parallel.order import shared_out
from dsjax.parallel.placement import batch_sharding, rows_here, whole_array, whole_batch


class HeldoutLoss(NamedTuple):
    """Loss on held-out text, over all its real targets."""

    nats_per_token: float
    bits_per_byte: float
    tokens: int


@jax.jit
def batch_nll(model: Transformer, batch: DeviceBatch) -> Float[Array, "B T"]:
    """Negative log-likelihood of every target in nats; 0 where none counts. On a mesh in the order of its devices."""
    batch = shared_out(batch)
    hidden = model(batch["tokens"], batch["positions"], batch["segment_ids"], inference=True).hidden
    nll = token_nll(model.norm(hidden), model.lm_head.weight[...], batch["targets"])
    return jnp.where(batch["loss_mask"] > 0, nll, 0)


def heldout_loss(
    model: Transformer,
    batches: Sequence[Batch],
    token_bytes: Int32[np.ndarray, "V"],
    mesh: Mesh | None = None,
) -> HeldoutLoss:
    """Cross-entropy over ``batches``, a token and a byte of the text.

    ``token_bytes`` gives the UTF-8 bytes that each token stands for, 0 for control tokens; their loss counts,
    their bytes do not exist. Sums are taken in float64. On a mesh every process has all batches.
    """
    nll, tokens, size_bytes = 0.0, 0, 0
    for batch in batches:
        counts = batch["loss_mask"] > 0
        nll += float(np.sum(np.asarray(_nll_of(model, batch, mesh), np.float64)))
        tokens += int(counts.sum())
        size_bytes += int(token_bytes[batch["targets"]][counts].sum())
    return HeldoutLoss(nll / max(tokens, 1), nll / math.log(2) / max(size_bytes, 1), tokens)


def _nll_of(model: Transformer, batch: Batch, mesh: Mesh | None) -> Float[np.ndarray, "B T"]:
    if mesh is None:
        return np.asarray(batch_nll(model, batch))
    rows = batch["tokens"].shape[0]
    lies = batch_sharding(mesh, rows)
    own = jax.tree.map(lambda x: x[rows_here(lies, rows)], batch)
    with jax.set_mesh(mesh):
        return whole_array(batch_nll(model, whole_batch(own, lies, rows)), mesh)

"""What data decides: of what kernels are compiled for, the share that they compute."""

from dsjax.config import RunConfig
from pallas_kernels.sparse_mla.union import KEYS


def computed_shares(config: RunConfig) -> dict[str, float]:
    """By a pattern of the kernel's name; all others compute everything.

    Experts: the rows that there are at even loads, of those that there is room for. Attention over a selection: top-k
    keys, where the kernel says what one tile of them costs; a block of queries that do not agree has more. Pairs of a
    query and a key that it may not see, tile by tile: where a device has the beginning and the end of a sequence, half
    of them; where it has all of a sequence, stretches of queries leave them out of the program.
    """
    model, mesh, length = config.model, config.mesh, config.train.sequence_length
    exchanged = mesh.expert * mesh.tensor > 1
    in_pieces = mesh.context * mesh.tensor > 1
    tile = min(config.model.attention_block_size, length)
    return {
        r"gmm\)": 1 / model.expert_capacity if exchanged else 1.0,
        r"sparse_mla|/indexer_loss": min(model.index_topk, length) / KEYS if model.has_indexer else 1.0,
        r"index_scores|dense_mla|dense_indexer_loss": (1 + tile / length) / 2 if in_pieces else 1.0,
    }

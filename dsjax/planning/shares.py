"""What data decides: of what kernels are compiled for, the share that they compute."""

import math

from dsjax.config import ConfigError, RunConfig
from dsjax.planning.chips import Chip
from pallas_kernels.sparse_mla.union import KEYS


def computed_shares(config: RunConfig, chip: Chip, step: str) -> dict[str, float]:
    """By a pattern of the kernel's place in the model; all others compute everything.

    Experts: the rows that there are at even loads, of those that there is room for, or that are gathered. Attention
    over a selection on TPU, where the kernel says what one tile of keys costs: all that a query selects; a block of
    queries that do not agree has more. Pairs of a query and a key that it may not see, in training: where a device has
    the beginning and the end of a sequence, half of them, tile by tile; where it has all of a sequence, stretches of
    queries leave them out of the program.

    Raises ConfigError where experts of even loads have not room for their rows: rounds are counted as one.
    """
    model, mesh, length = config.model, config.mesh, config.train.sequence_length
    shards = mesh.expert * mesh.tensor
    gathered = model.expert_exchange == "gathered"
    if shards > 1 and not gathered and model.expert_capacity < 1:
        raise ConfigError(
            f"model.expert_capacity={model.expert_capacity} takes several rounds at even loads, and a plan counts one: "
            "use 1 or more"
        )
    experts = 1.0 if shards == 1 else 1 / shards if gathered else 1 / model.expert_capacity
    selected = min(model.index_topk, length) if model.has_indexer else length
    tile = min(model.attention_block_size, length)
    in_pieces = step == "train" and mesh.context * mesh.tensor > 1
    return {
        r"gmm\)|/grouped_": experts,
        r"/sparse_mla|/indexer_loss": 1.0 if chip.devices_per_node else math.ceil(selected / KEYS),
        r"/index_scores|/dense_": (1 + tile / length) / 2 if in_pieces else 1.0,
    }

"""Token embeddings, whose table lies in columns on the devices: no device has a whole one."""

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from dsjax.parallel.collectives import per_device
from dsjax.parallel.rules import layout, names_at

TABLE_AXES = ("token_ids", "columns")


def lookup(table: Float[Array, "V D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """The row of each token.

    Every device takes its columns of the rows that its neighbours want, and gives them theirs: one row a token is
    sent, and nothing added up.
    """
    columns, place = layout(table.shape, *TABLE_AXES), layout(tokens.shape, "batch", "length")
    names = names_at(columns, 1)

    def own(table, tokens):
        if not names:
            return table[tokens]
        rows = table[jax.lax.all_gather(tokens, names)]  # [devices, B, T, columns]
        return jax.lax.all_to_all(rows, names, split_axis=0, concat_axis=3, tiled=True)[0]

    return per_device(own, (columns, place), PartitionSpec(*place, None))(table, tokens)

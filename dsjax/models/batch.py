"""The form in which the model's losses take packed sequences."""

from typing import TypedDict

from jaxtyping import Array, Float, Int


class DeviceBatch(TypedDict):
    """A batch of the loader as arrays of the device; the fields are those of ``dsjax.data.windows.Batch``."""

    tokens: Int[Array, "B T"]
    targets: Int[Array, "B T"]  # the next token
    segment_ids: Int[Array, "B T"]  # 0 is padding; different documents differ where they are isolated
    positions: Int[Array, "B T"]
    loss_mask: Float[Array, "B T"]  # 1 where the target counts

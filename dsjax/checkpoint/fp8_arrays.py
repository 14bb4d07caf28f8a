"""Arrays that a checkpoint holds in FP8 with their block scales beside them."""

import functools
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array

from dsjax.checkpoint.errors import CheckpointError
from dsjax.checkpoint.hf_names import SCALE_SUFFIX
from dsjax.precision.block_scales import BLOCK, dequantise, quantise


def quantised(weight: np.ndarray, *, power_of_two: bool, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Values and scales as ``quantise`` makes them. Raises CheckpointError where ``what`` holds no finite numbers."""
    values, scales = map(np.asarray, quantise(weight, power_of_two=power_of_two))
    if not np.isfinite(scales).all():
        raise CheckpointError(
            f"{what} holds a number that is not finite, which FP8 cannot say: use --dtype bfloat16 to see the weights "
            "as they are"
        )
    return values, scales


def as_stored(saved: dict[str, Any], wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """What to load for those of ``wanted`` that have scales in ``saved``: values in FP8, and all scales everywhere."""
    read = {}
    for name, leaf in wanted.items():
        scale = saved.get(name + SCALE_SUFFIX)
        if scale is None:
            continue
        read[name] = jax.ShapeDtypeStruct(leaf.shape, saved[name].dtype, sharding=leaf.sharding)
        read[name + SCALE_SUFFIX] = jax.ShapeDtypeStruct(
            scale.shape, scale.dtype, sharding=everywhere(leaf.sharding)
        )
    return read


def everywhere(sharding: Any) -> Sharding:
    """Whole on every device that ``sharding`` spreads over: what block scales are."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec())
    return sharding


def scaled(loaded: dict[str, Any], wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """The arrays that ``as_stored`` named, scaled and as ``wanted``; each FP8 array is freed as its turn comes."""
    for name, leaf in wanted.items():
        if name + SCALE_SUFFIX in loaded:
            finish = functools.partial(_scaled, dtype=leaf.dtype)
            run = jax.jit(finish, out_shardings=leaf.sharding)
            loaded[name] = run(loaded[name], loaded.pop(name + SCALE_SUFFIX))
    return loaded


def _scaled(values: Array, scales: Array, *, dtype: Any) -> Array:
    """Ours are [in, out] with heads split from either; scales have an axis for each."""
    lead, own = values.shape[: scales.ndim - 2], values.shape[scales.ndim - 2 :]
    blocks = scales.shape[-2:]
    widths = ((math.prod(own[:split]), math.prod(own[split:])) for split in range(1, len(own)))
    matrix = next(width for width in widths if tuple(-(-n // BLOCK) for n in width) == blocks)
    return dequantise(values.reshape(*lead, *matrix), scales, dtype).reshape(values.shape)

"""Layers of one shape, their parameters stacked along a first axis and run by a scan."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx

from dsjax.models.causal_blocks import KEPT
from dsjax.models.linear import PRODUCT
from pallas_kernels.residuals import LSE, SELECTION

Layer = TypeVar("Layer", bound=nnx.Module)


def stack_layers(build: Callable[..., Layer], count: int, *, rngs: nnx.Rngs) -> Layer | None:
    """``count`` layers from ``build(rngs=...)`` as one module with stacked parameters; None for no layers.

    Every parameter gains a first axis named "layers".
    """
    if count == 0:
        return None
    keys = jax.random.split(rngs.params(), count)
    layers = jax.vmap(lambda key: build(rngs=nnx.Rngs(params=key)))(keys)
    for variable in jax.tree.leaves(layers, is_leaf=lambda x: isinstance(x, nnx.Variable)):
        variable.set_metadata(axes=("layers", *variable.axes))
    return layers


def number_of(layers: nnx.Module) -> int:
    """How many layers a stack has."""
    return jax.tree.leaves(layers)[0].shape[0]


def layer_at(layers: Layer, index: int) -> Layer:
    """One layer of a stack, as an ordinary module."""
    return jax.tree.map(lambda stacked: stacked[index], layers)


def rematerialise(function: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """Wraps a layer's forward pass so that the backward pass recomputes what ``remat`` says."""
    if remat == "none":
        return function
    named = jax.checkpoint_policies.save_only_these_names
    kept = {
        "layer": jax.checkpoint_policies.save_from_both_policies(KEPT, named(PRODUCT)),
        "attention": named(SELECTION, LSE, PRODUCT),
        "full": None,
    }
    return jax.checkpoint(function, policy=kept[remat])

"""Next-token cross-entropy without the logits of a whole batch, nor a whole vocabulary on a device."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from dsjax.parallel.collectives import (
    gather,
    highest_over,
    per_device,
    place_along,
    scatter_sum,
    sum_over,
)
from dsjax.parallel.rules import Axes, layout, names_at

# Logits that exist at once on a device: 64 MiB in float32, whatever the vocabulary.
_LOGITS_AT_ONCE = 1 << 24


def cross_entropy_sum(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
) -> Float[Array, ""]:
    """``Σ weights · (logsumexp(h W) - (h W)[target])`` in nats, float32; ``hidden`` has been normed.

    Logits are float32 and computed for a block of tokens at a time. The gradients are formed in the forward
    pass, while a block's logits are at hand, so they are never computed twice. ``weights`` get no gradient.
    """
    lies = _Layout.of(targets, head)

    def own(hidden, head, targets, weights):
        head = gather(head, lies.inner, 0)
        return _own_sum(hidden.reshape(-1, hidden.shape[-1]), head, targets, weights, lies.columns)

    return jnp.sum(lies.per_device(own, 2)(hidden, head, targets, weights))


def token_nll(
    hidden: Float[Array, "B T D"], head: Float[Array, "D V"], targets: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """Negative log-likelihood of each target in nats, float32, in the same blocks; no gradient rule of its own."""
    lies = _Layout.of(targets, head)

    def own(hidden, head, targets):
        head, rows = gather(head, lies.inner, 0), targets.reshape(-1)
        blocks = _blocks(head.shape[1], lies.columns, hidden.reshape(-1, hidden.shape[-1]), rows)
        nll = jax.lax.map(lambda block: _nll(block[0], head, block[1], lies.columns).nll, blocks)
        return nll.reshape(-1)[: rows.shape[0]].reshape(targets.shape)

    return lies.per_device(own, 1)(hidden, head, targets)


class _Layout(NamedTuple):
    """How tokens and head lie on the mesh: a device has some tokens, and some columns of the head."""

    tokens: PartitionSpec
    head: PartitionSpec

    @classmethod
    def of(cls, tokens: Array, head: Array) -> "_Layout":
        return cls(layout(tokens.shape, "batch", "length"), layout(head.shape, "embed", "vocab"))

    @property
    def inner(self) -> Axes:
        """The axes over which the rows of the head are gathered."""
        return names_at(self.head, 0)

    @property
    def columns(self) -> Axes:
        """The axes along which devices share tokens, each computing the logits of its columns."""
        return names_at(self.head, 1)

    def per_device(self, function: Callable[..., Any], others: int) -> Callable[..., Array]:
        """Of hidden states, head and so many arrays [B, T]; the result has an entry a device, or one a token."""
        arguments = PartitionSpec(*self.tokens, None), self.head, *[self.tokens] * others
        return per_device(function, arguments, self.tokens)


def _blocks(columns: int, names: Axes, *arrays: Array) -> tuple[Array, ...]:
    """The arrays cut along the tokens, the last block padded with zeros."""
    tokens = arrays[0].shape[0]
    devices = jax.lax.axis_size(names) if names else 1
    block = max(1, min(tokens, _LOGITS_AT_ONCE // (columns * devices)))
    count = -(-tokens // block)
    padding = count * block - tokens

    def cut(x):
        return jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)).reshape(count, block, *x.shape[1:])

    return tuple(cut(x) for x in arrays)


class _Block(NamedTuple):
    """The tokens of a block, with those of the devices that share the columns of the head."""

    nll: Float[Array, "R"]  # of this device's own
    hidden: Float[Array, "M D"]  # of all
    log_p: Float[Array, "M V"]  # in this device's columns
    is_target: Float[Array, "M V"]


def _nll(h, head, targets, names: Axes) -> _Block:
    """Loss and log-probabilities of one block."""
    own = h.shape[0]
    h, targets = gather(h, names, 0), gather(targets, names, 0)
    logits = jnp.matmul(h, head.astype(h.dtype), preferred_element_type=jnp.float32)
    highest = highest_over(jax.lax.stop_gradient(jnp.max(logits, axis=-1)), names)
    logits -= highest[:, None]
    log_p = logits - jnp.log(sum_over(jnp.sum(jnp.exp(logits), axis=-1), names))[:, None]
    column = targets - place_along(names) * head.shape[1]
    is_target = column[:, None] == jnp.arange(head.shape[1])
    nll = sum_over(-jnp.sum(jnp.where(is_target, log_p, 0), axis=-1), names)
    return _Block(jax.lax.dynamic_slice_in_dim(nll, place_along(names) * own, own), h, log_p, is_target)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _own_sum(hidden, head, targets, weights, names) -> Float[Array, "1 1"]:
    def add(total, block):
        h, t, w = block
        return total + jnp.sum(w * _nll(h, head, t, names).nll), None

    blocks = _blocks(head.shape[1], names, hidden, targets.reshape(-1), weights.reshape(-1))
    return jax.lax.scan(add, jnp.float32(0), blocks)[0].reshape(1, 1)


def _own_sum_forward(hidden, head, targets, weights, names):
    def add(carry, block):
        total, d_head = carry
        h, t, w = block
        of_block = _nll(h, head, t, names)
        d_logits = (jnp.exp(of_block.log_p) - of_block.is_target) * gather(w, names, 0)[:, None]
        d_logits = d_logits.astype(h.dtype)
        d_h = jnp.matmul(d_logits, head.T.astype(h.dtype), preferred_element_type=jnp.float32)
        d_h = scatter_sum(d_h, names, 0).astype(h.dtype)
        d_head = d_head + jnp.matmul(of_block.hidden.T, d_logits, preferred_element_type=jnp.float32)
        return (total + jnp.sum(w * of_block.nll), d_head), d_h

    start = (jnp.float32(0), jnp.zeros(head.shape, jnp.float32))
    blocks = _blocks(head.shape[1], names, hidden, targets.reshape(-1), weights.reshape(-1))
    (total, d_head), d_hidden = jax.lax.scan(add, start, blocks)
    d_hidden = d_hidden.reshape(-1, hidden.shape[-1])[: hidden.shape[0]]
    return total.reshape(1, 1), (d_hidden, d_head.astype(head.dtype))


def _own_sum_backward(names, residuals, d_total):
    d_hidden, d_head = residuals
    scaled = functools.partial(jnp.multiply, d_total)
    return scaled(d_hidden).astype(d_hidden.dtype), scaled(d_head).astype(d_head.dtype), None, None


_own_sum.defvjp(_own_sum_forward, _own_sum_backward)

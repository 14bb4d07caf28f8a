"""Next-token cross-entropy without the logits of a whole batch."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Logits that exist at once: 64 MiB in float32, whatever the vocabulary.
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
    flat = (hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), weights.reshape(-1))
    return _cross_entropy_sum(flat[0], head, flat[1], flat[2])


def token_nll(
    hidden: Float[Array, "B T D"], head: Float[Array, "D V"], targets: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """Negative log-likelihood of each target in nats, float32, in the same blocks; no gradient rule of its own."""
    flat, rows = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    blocks = _blocks(head.shape[1], flat, rows)
    nll = jax.lax.map(lambda block: _nll(block[0], head, block[1])[0], blocks)
    return nll.reshape(-1)[: rows.shape[0]].reshape(targets.shape)


def _blocks(vocab_size: int, *arrays: Array) -> tuple[Array, ...]:
    """The arrays cut along the tokens, the last block padded with zeros."""
    tokens = arrays[0].shape[0]
    block = max(1, min(tokens, _LOGITS_AT_ONCE // vocab_size))
    count = -(-tokens // block)
    padding = count * block - tokens

    def cut(x):
        return jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)).reshape(count, block, *x.shape[1:])

    return tuple(cut(x) for x in arrays)


def _nll(h, head, targets):
    """Loss and log-probabilities of one block."""
    logits = jnp.matmul(h, head.astype(h.dtype), preferred_element_type=jnp.float32)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.take_along_axis(log_p, targets[:, None], axis=-1)[:, 0], log_p


@jax.custom_vjp
def _cross_entropy_sum(hidden, head, targets, weights):
    def add(total, block):
        h, t, w = block
        return total + jnp.sum(w * _nll(h, head, t)[0]), None

    return jax.lax.scan(add, jnp.float32(0), _blocks(head.shape[1], hidden, targets, weights))[0]


def _forward(hidden, head, targets, weights):
    def add(carry, block):
        total, d_head = carry
        h, t, w = block
        nll, log_p = _nll(h, head, t)
        d_logits = (jnp.exp(log_p) - (t[:, None] == jnp.arange(log_p.shape[-1]))) * w[:, None]
        d_logits = d_logits.astype(h.dtype)
        d_h = jnp.matmul(d_logits, head.T.astype(h.dtype), preferred_element_type=jnp.float32)
        d_head = d_head + jnp.matmul(h.T, d_logits, preferred_element_type=jnp.float32)
        return (total + jnp.sum(w * nll), d_head), d_h.astype(h.dtype)

    start = (jnp.float32(0), jnp.zeros(head.shape, jnp.float32))
    (total, d_head), d_hidden = jax.lax.scan(add, start, _blocks(head.shape[1], hidden, targets, weights))
    d_hidden = d_hidden.reshape(-1, hidden.shape[-1])[: hidden.shape[0]]
    return total, (d_hidden, d_head.astype(head.dtype))


def _backward(residuals, d_total):
    d_hidden, d_head = residuals
    scaled = functools.partial(jnp.multiply, d_total)
    return scaled(d_hidden).astype(d_hidden.dtype), scaled(d_head).astype(d_head.dtype), None, None


_cross_entropy_sum.defvjp(_forward, _backward)

"""Generation for a batch of equally long prompts: one forward pass, then a token at a time from the cache."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from dsjax.inference.sampling import sample
from dsjax.models.transformer import Transformer, cache_from
from dsjax.parallel.order import in_order, shared_out


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "temperature", "top_p"))
def generate(
    model: Transformer,
    prompts: Int[Array, "B T"],
    key: PRNGKeyArray,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Int[Array, "B new"]:
    """``max_new_tokens`` further tokens for each prompt, int32; prompts must not be padded.

    Compiled once a shape and setting. Stop tokens are the caller's to look for: what follows one is noise.
    """
    length = prompts.shape[1]
    choose = functools.partial(sample, temperature=temperature, top_p=top_p)
    output = model(shared_out(prompts), inference=True)
    latents = jax.tree.map(jax.vmap(in_order), output.latents)  # of each layer
    cache = cache_from(latents, length + max_new_tokens)
    first_key, key = jax.random.split(key)
    first = choose(model.logits(in_order(output.hidden)[:, -1]), first_key)

    def next_token(carry, step_and_key):
        token, cache = carry
        step, step_key = step_and_key
        number = jnp.full((prompts.shape[0], 1), length, jnp.int32) + step
        hidden, cache = model.decode(token[:, None], number, cache)
        token = choose(model.logits(hidden[:, 0]), step_key)
        return (token, cache), token

    steps = jnp.arange(max_new_tokens - 1, dtype=jnp.int32)
    keys = jax.random.split(key, max_new_tokens - 1)
    _, others = jax.lax.scan(next_token, (first, cache), (steps, keys))
    return jnp.concatenate([first[None], others]).T

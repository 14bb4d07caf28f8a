"""Text in, text out."""

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.data import Tokenizer
from dsjax.inference.generate import generate
from dsjax.models.transformer import Transformer


def complete(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> str:
    """``prompt`` and what the model writes after it, up to the end of the document."""
    ids = np.concatenate([[tokenizer.bos_id], tokenizer.encode_documents([prompt])[0]])
    room = model.config.max_position_embeddings - len(ids)
    new = generate(
        model,
        jnp.asarray(ids[None], jnp.int32),
        jax.random.key(seed),
        max_new_tokens=min(max_new_tokens, room),
        temperature=temperature,
        top_p=top_p,
    )
    tokens = np.asarray(new[0])
    ends = np.flatnonzero(tokens == tokenizer.eos_id)
    return prompt + tokenizer.decode(tokens[: ends[0]] if len(ends) else tokens)

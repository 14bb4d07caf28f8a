"""Text in, text out."""

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.config import EvalConfig
from dsjax.data.tokenizer import Tokenizer
from dsjax.inference.generate import generate
from dsjax.models.transformer import Transformer


def complete(model: Transformer, tokenizer: Tokenizer, settings: EvalConfig, *, seed: int) -> str:
    """The prompt of ``settings`` and what the model writes after it, up to the end of the document."""
    ids = np.concatenate([[tokenizer.bos_id], tokenizer.encode_documents([settings.sample_prompt])[0]])
    ids = ids[-(model.config.max_position_embeddings - 1) :]  # of a longer prompt, its end
    room = model.config.max_position_embeddings - len(ids)
    new = generate(
        model,
        jnp.asarray(ids[None], jnp.int32),
        jax.random.key(seed),
        max_new_tokens=min(settings.sample_tokens, room),
        temperature=settings.sample_temperature,
        top_p=settings.sample_top_p,
    )
    tokens = np.asarray(new[0])
    ends = np.flatnonzero(tokens == tokenizer.eos_id)
    return settings.sample_prompt + tokenizer.decode(tokens[: ends[0]] if len(ends) else tokens)

"""Text in, text out."""

import contextlib

import jax
import numpy as np
from jax.sharding import Mesh

from dsjax.config import EvalConfig
from dsjax.data.tokenizer import Tokenizer
from dsjax.inference.generate import generate
from dsjax.models.transformer import Transformer
from dsjax.parallel.placement import whole_array


def complete(
    model: Transformer,
    tokenizer: Tokenizer,
    settings: EvalConfig,
    *,
    seed: int,
    mesh: Mesh | None = None,
) -> str:
    """The prompt of ``settings`` and what the model writes after it, up to the end of the document.

    A model on a mesh writes there, and every process is given the text.
    """
    ids = np.concatenate([[tokenizer.bos_id], tokenizer.encode_documents([settings.sample_prompt])[0]])
    ids = ids[-(model.config.max_position_embeddings - 1) :]  # of a longer prompt, its end
    room = model.config.max_position_embeddings - len(ids)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        new = generate(
            model,
            np.asarray(ids[None], np.int32),
            jax.random.key(seed),
            max_new_tokens=min(settings.sample_tokens, room),
            temperature=settings.sample_temperature,
            top_p=settings.sample_top_p,
        )
    tokens = whole_array(new, mesh)[0]
    ends = np.flatnonzero(tokens == tokenizer.eos_id)
    return settings.sample_prompt + tokenizer.decode(tokens[: ends[0]] if len(ends) else tokens)

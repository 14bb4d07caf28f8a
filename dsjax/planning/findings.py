"""What a program for many devices must not do: bring together what lies apart, and store a number for every pair."""

from collections.abc import Sequence

from dsjax.config import ModelConfig
from dsjax.planning.hlo import Program
from dsjax.planning.network import Collective


def brought_together(collectives: Sequence[Collective], model: ModelConfig) -> tuple[str, ...]:
    """Messages after which a device has as many numbers as the experts of a layer, or the whole head, have.

    By their number alone, so that no shape hides them; in a small model hidden states of many tokens have as many.
    """
    limits = {
        "all experts of a layer": model.n_routed_experts * model.hidden_size * model.moe_intermediate_size,
        "a whole vocabulary": model.vocab_size * model.hidden_size,
    }
    found = (
        f"{name}: {collective.kind} {collective.result} over {'·'.join(collective.axes)}"
        for collective in collectives
        for name, limit in limits.items()
        if collective.kind in ("all-gather", "all-reduce") and collective.largest >= limit
    )
    return tuple(dict.fromkeys(found))


def of_pairs(program: Program, model: ModelConfig, length: int, tokens_here: int) -> tuple[str, ...]:
    """Arrays with an axis of all keys and one of all of a device's queries.

    Looked for where sequences are longer than everything else is wide: 128K tokens.
    """
    if length <= max(model.vocab_size, model.num_attention_heads * model.qk_head_dim):
        return ()
    found = set()
    for run in program.runs():
        for array in run.instruction.arrays:
            keys = [size for size in array.shape if size >= length]
            queries = [size for size in array.shape if size >= tokens_here]
            if keys and len(queries) > 1:
                found.add(f"{array.dtype}{list(array.shape)} {run.instruction.op_name[-60:]}")
    return tuple(sorted(found))

"""Every tensor of a released checkpoint: its name, shape and dtype there, and its place in our tree.

The one table: importing, exporting and inspecting read it. Our names are the checkpoint's own wherever it has one; a
matrix is stored there as [out, in] and here as [in, out], heads split from their width, experts and layers stacked.

Source: the headers of ``deepseek-ai/DeepSeek-V3.2`` and ``deepseek-ai/DeepSeek-V3``; V3's ``README_WEIGHTS.md``.
"""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

from dsjax.config import ModelConfig
from dsjax.precision.block_scales import BLOCK

Dtype = Literal["F8_E4M3", "BF16", "F32"]
SCALE_SUFFIX = "_scale_inv"
EMBEDDING = "model.embed_tokens.weight"


class CheckpointTensor(NamedTuple):
    """One tensor of a checkpoint."""

    name: str
    shape: tuple[int, ...]
    dtype: Dtype
    path: str  # of the stacked array in our tree that holds it
    place: tuple[int, ...]  # where in it: nothing, (layer,) or (layer, expert)
    ours: tuple[int, ...]  # its shape there
    order: tuple[int, ...] = ()  # our axes as theirs lie: theirs is ours.transpose(order).reshape(shape)
    copy_of: str | None = None  # the tensor that it repeats
    scale_of: str | None = None  # the FP8 matrix that it scales


class _Part(NamedTuple):
    """A tensor as the checkpoint has it; within a layer it has the same name in our tree."""

    name: str
    shape: tuple[int, ...]
    dtype: Dtype
    ours: tuple[int, ...] | None = (
        None  # its shape with us; None: the transpose of a matrix, or the vector itself
    )

    def under(self, prefix: str) -> "_Part":
        return self._replace(name=prefix + self.name)


def checkpoint_tensors(config: ModelConfig) -> Iterator[CheckpointTensor]:
    """Every tensor of the checkpoint of ``config``, layer by layer, each FP8 matrix followed by its scales."""
    yield _embedding(EMBEDDING, config)
    dense = config.first_k_dense_replace
    for number in range(config.num_hidden_layers):
        stack, first = ("dense_layers", 0) if number < dense else ("moe_layers", dense)
        yield from _layer(config, number, stack, (number - first,), sparse=number >= dense)
    if config.num_nextn_predict_layers:
        yield from _mtp(config)
    yield from _tensors(_Part("model.norm.weight", (config.hidden_size,), _norm_dtype(config)), "norm.weight")
    yield from _tensors(_head("lm_head.weight", config), "lm_head.weight")


def mtp_prefix(config: ModelConfig) -> str:
    """What the names of all tensors of multi-token prediction begin with: a layer after the last."""
    return f"model.layers.{config.num_hidden_layers}."


def is_derived(name: str) -> bool:
    """Whether a tensor that some tools save follows from the configuration and is not needed."""
    return name.endswith("rotary_emb.inv_freq")


def _mtp(config: ModelConfig) -> Iterator[CheckpointTensor]:
    number, hidden = config.num_hidden_layers, config.hidden_size
    prefix, norm = mtp_prefix(config), _norm_dtype(config)
    yield from _layer(config, number, "mtp.layer", (), sparse=True)
    for theirs, ours in (("enorm", "enorm"), ("hnorm", "hnorm"), ("shared_head.norm", "norm")):
        yield from _tensors(_Part(f"{prefix}{theirs}.weight", (hidden,), norm), f"mtp.{ours}.weight")
    yield from _tensors(_Part(f"{prefix}eh_proj.weight", (hidden, 2 * hidden), "BF16"), "mtp.eh_proj.weight")
    embedding = _embedding(f"{prefix}embed_tokens.weight", config)
    yield embedding._replace(copy_of=EMBEDDING)
    (head,) = _tensors(_head(f"{prefix}shared_head.head.weight", config), "lm_head.weight")
    yield head._replace(copy_of="lm_head.weight")


def _embedding(name: str, config: ModelConfig) -> CheckpointTensor:
    shape = (config.vocab_size, config.hidden_size)
    return CheckpointTensor(name, shape, "BF16", "embed_tokens", (), shape, (0, 1))


def _head(name: str, config: ModelConfig) -> _Part:
    return _Part(name, (config.vocab_size, config.hidden_size), "BF16")


def _layer(
    config: ModelConfig, number: int, stack: str, place: tuple[int, ...], *, sparse: bool
) -> Iterator[CheckpointTensor]:
    prefix = f"model.layers.{number}."
    for part in (*_attention(config), *(_sparse_mlp(config) if sparse else _mlp(config))):
        yield from _tensors(part.under(prefix), f"{stack}.{part.name}", place)
    if not sparse:
        return
    for expert in range(config.n_routed_experts):
        for part in _swiglu("", config.hidden_size, config.moe_intermediate_size):
            path = f"{stack}.mlp.experts.{part.name.removesuffix('.weight')}"
            yield from _tensors(part.under(f"{prefix}mlp.experts.{expert}."), path, (*place, expert))


def _tensors(part: _Part, path: str, place: tuple[int, ...] = ()) -> Iterator[CheckpointTensor]:
    """The tensor, and its scales if it is an FP8 matrix."""
    name, shape, dtype, ours = part
    ours = ours or shape[::-1]
    yield CheckpointTensor(name, shape, dtype, path, place, ours, _order(shape, ours))
    if dtype == "F8_E4M3":
        blocks = tuple(-(-width // BLOCK) for width in shape)
        scale = (name + SCALE_SUFFIX, blocks, "F32", path + SCALE_SUFFIX, place, blocks[::-1], (1, 0))
        yield CheckpointTensor(*scale, scale_of=name)


def _order(shape: tuple[int, ...], ours: tuple[int, ...]) -> tuple[int, ...]:
    """Theirs is [out, in], ours has the axes of ``in`` first."""
    axes = tuple(range(len(ours)))
    if len(shape) == 1:
        return axes
    split = next(count for count in axes if math.prod(ours[:count]) == shape[1])
    return axes[split:] + axes[:split]


def _attention(config: ModelConfig) -> Iterator[_Part]:
    hidden, heads, q_rank, kv_rank = (
        config.hidden_size,
        config.num_attention_heads,
        config.q_lora_rank,
        config.kv_lora_rank,
    )
    norm, kv_width = _norm_dtype(config), config.qk_nope_head_dim + config.v_head_dim
    yield _Part("input_layernorm.weight", (hidden,), norm)
    yield _Part("post_attention_layernorm.weight", (hidden,), norm)
    yield _Part("self_attn.q_a_proj.weight", (q_rank, hidden), "F8_E4M3")
    yield _Part("self_attn.q_a_layernorm.weight", (q_rank,), norm)
    yield _split("self_attn.q_b_proj.weight", q_rank, heads, config.qk_head_dim)
    yield _Part("self_attn.kv_a_proj_with_mqa.weight", (kv_rank + config.qk_rope_head_dim, hidden), "F8_E4M3")
    yield _Part("self_attn.kv_a_layernorm.weight", (kv_rank,), norm)
    yield _split("self_attn.kv_b_proj.weight", kv_rank, heads, kv_width)
    o_shape = (hidden, heads * config.v_head_dim)
    yield _Part("self_attn.o_proj.weight", o_shape, "F8_E4M3", (heads, config.v_head_dim, hidden))
    if config.has_indexer:
        width = config.index_head_dim
        yield _split("self_attn.indexer.wq_b.weight", q_rank, config.index_n_heads, width)
        yield _Part("self_attn.indexer.wk.weight", (width, hidden), "F8_E4M3")
        yield _Part("self_attn.indexer.k_norm.weight", (width,), "F32")
        yield _Part("self_attn.indexer.k_norm.bias", (width,), "F32")
        yield _Part("self_attn.indexer.weights_proj.weight", (config.index_n_heads, hidden), "BF16")


def _split(name: str, rank: int, heads: int, width: int) -> _Part:
    """A matrix into heads, which keep an axis of their own with us."""
    return _Part(name, (heads * width, rank), "F8_E4M3", (rank, heads, width))


def _mlp(config: ModelConfig) -> Iterator[_Part]:
    return _swiglu("mlp.", config.hidden_size, config.intermediate_size)


def _sparse_mlp(config: ModelConfig) -> Iterator[_Part]:
    hidden, experts = config.hidden_size, config.n_routed_experts
    yield _Part("mlp.gate.weight", (experts, hidden), "BF16")
    yield _Part("mlp.gate.e_score_correction_bias", (experts,), "F32")
    if config.n_shared_experts:
        width = config.n_shared_experts * config.moe_intermediate_size
        yield from _swiglu("mlp.shared_experts.", hidden, width)


def _swiglu(prefix: str, hidden: int, width: int) -> Iterator[_Part]:
    yield _Part(f"{prefix}gate_proj.weight", (width, hidden), "F8_E4M3")
    yield _Part(f"{prefix}up_proj.weight", (width, hidden), "F8_E4M3")
    yield _Part(f"{prefix}down_proj.weight", (hidden, width), "F8_E4M3")


def _norm_dtype(config: ModelConfig) -> Dtype:
    """V3.2 keeps its norms in float32, V3 in bfloat16."""
    return "F32" if config.has_indexer else "BF16"

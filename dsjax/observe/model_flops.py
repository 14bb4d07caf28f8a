"""How many floating-point operations a token costs the model: the numerator of MFU."""

import dataclasses

from dsjax.config import ModelConfig


def active_matmul_params(config: ModelConfig) -> int:
    """Weights that one token is multiplied with: all but embedding, norms and the experts it does not choose.

    The head counts, once more for the MTP module, which also brings a layer and its projection.
    """
    moe_layer = _attention_params(config) + _moe_params(config)
    dense_layer = _attention_params(config) + 3 * config.hidden_size * config.intermediate_size
    head = config.hidden_size * config.vocab_size
    total = config.first_k_dense_replace * dense_layer + config.num_moe_layers * moe_layer + head
    return total + config.num_nextn_predict_layers * (moe_layer + 2 * config.hidden_size**2 + head)


def train_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """FLOPs of a forward and a backward pass a token, nothing counted twice for being recomputed.

    ``3 · (2 · active weights + attention)``; attention counts, at the mean over positions, every attended pair, in the
    form that sequences of this length have: MHA, or beyond ``dense_attention_max_length`` MQA, in which the V3.2-Exp
    report defines sparse attention. The indexer scores every causal pair once; its loss, and so its gradient, is of
    attended pairs.
    """
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    causal_pairs = (sequence_length + 1) / 2
    attended_pairs = causal_pairs
    indexer_flops = 0.0
    if config.has_indexer:
        k = min(config.index_topk, sequence_length)
        attended_pairs = (k * (k + 1) / 2 + (sequence_length - k) * k) / sequence_length
        a_pair = 2 * config.index_n_heads * config.index_head_dim
        indexer_flops = a_pair * (causal_pairs + 2 * attended_pairs) / 3
    is_mqa = config.has_indexer and sequence_length > config.dense_attention_max_length
    head_flops = _mqa_flops(config) if is_mqa else 2 * (config.qk_head_dim + config.v_head_dim)
    attention = layers * (config.num_attention_heads * head_flops * attended_pairs + indexer_flops)
    return 3 * (2 * active_matmul_params(config) + attention)


def decode_flops_per_token(config: ModelConfig, context: int) -> float:
    """FLOPs of one more token after ``context`` others: active weights, the indexer over all, attention to the chosen.

    Attention in its MQA form, whose queries are as wide as the latents.
    """
    attended = min(config.index_topk, context) if config.has_indexer else context
    indexer = 2 * config.index_n_heads * config.index_head_dim * context if config.has_indexer else 0
    alone = dataclasses.replace(config, num_nextn_predict_layers=0)
    attention = config.num_hidden_layers * (
        config.num_attention_heads * _mqa_flops(config) * attended + indexer
    )
    return 2 * active_matmul_params(alone) + attention


def _mqa_flops(config: ModelConfig) -> int:
    """Of a head for a pair: a latent and a rotary key, and the latent once more as the value."""
    return 2 * (2 * config.kv_lora_rank + config.qk_rope_head_dim)


def _attention_params(config: ModelConfig) -> int:
    hidden, heads = config.hidden_size, config.num_attention_heads
    params = hidden * config.q_lora_rank + config.q_lora_rank * heads * config.qk_head_dim
    params += hidden * (config.kv_lora_rank + config.qk_rope_head_dim)
    params += config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    params += heads * config.v_head_dim * hidden
    if config.has_indexer:
        params += config.q_lora_rank * config.index_n_heads * config.index_head_dim
        params += hidden * (config.index_head_dim + config.index_n_heads)
    return params


def _moe_params(config: ModelConfig) -> int:
    experts = config.num_experts_per_tok + config.n_shared_experts
    return config.hidden_size * (config.n_routed_experts + 3 * experts * config.moe_intermediate_size)

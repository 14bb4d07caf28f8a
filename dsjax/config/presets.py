"""Model shapes: the released ones, one for a single accelerator host, and those a laptop trains."""

from dsjax.config.model import ModelConfig


def deepseek_v32_671b() -> ModelConfig:
    """DeepSeek-V3.2 (and V3.2-Exp): 671.9B parameters, 36.6B active. Source: its ``config.json``."""
    return ModelConfig()


def deepseek_v3_671b() -> ModelConfig:
    """DeepSeek-V3, V3.1 and R1: the same without an indexer, attention dense. 671.0B parameters."""
    return ModelConfig(index_topk=0)


def v32_16b() -> ModelConfig:
    """A V3.2 of DeepSeek-V2-Lite's size for one host of 8 accelerators: about 16B parameters, 2.6B active."""
    return ModelConfig(
        vocab_size=129280,
        hidden_size=2048,
        num_hidden_layers=27,
        first_k_dense_replace=1,
        num_attention_heads=16,
        q_lora_rank=768,
        kv_lora_rank=512,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        n_group=8,
        topk_group=4,
        index_n_heads=16,
        index_topk=2048,
    )


def v32_small() -> ModelConfig:
    """About 100M parameters, 24M active: the model of the CPU benchmarks."""
    return ModelConfig(
        vocab_size=8192,
        hidden_size=512,
        num_hidden_layers=8,
        first_k_dense_replace=1,
        num_nextn_predict_layers=0,
        max_position_embeddings=4096,
        num_attention_heads=8,
        q_lora_rank=192,
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=16,
        index_n_heads=4,
        index_head_dim=32,
        index_topk=256,
        intermediate_size=1536,
        moe_intermediate_size=256,
        n_routed_experts=32,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        compute_dtype="float32",
        dense_attention_max_length=2048,
        remat="none",
        scan_layers=False,
    )


def v32_tiny() -> ModelConfig:
    """Under three million parameters with every part of V3.2: what ``configs/tiny.py`` trains on a laptop."""
    return ModelConfig(
        vocab_size=2048,
        hidden_size=128,
        num_hidden_layers=4,
        first_k_dense_replace=1,
        num_nextn_predict_layers=1,
        max_position_embeddings=1024,
        initializer_range=0.02,
        num_attention_heads=4,
        q_lora_rank=64,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        index_n_heads=4,
        index_head_dim=32,
        index_topk=64,
        intermediate_size=384,
        moe_intermediate_size=64,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        compute_dtype="float32",
        dense_attention_max_length=1024,
        remat="none",
    )

"""The shape of a model. Field names are those of the checkpoint's ``config.json``."""

import dataclasses
import math
from typing import Literal

from dsjax.config.errors import ConfigError
from dsjax.config.fields import check_types
from dsjax.config.freeze import Freezable


@dataclasses.dataclass(unsafe_hash=True)
class RopeScaling(Freezable):
    """YaRN context extension. Source: YaRN §3; ``config.json: rope_scaling``."""

    # How many times longer than the original the context becomes. 1: not at all.
    factor: float = 40.0
    # Tokens. Context length of pre-training; YaRN acts only where max_position_embeddings is more.
    original_max_position_embeddings: int = 4096
    # Frequencies that turn more often than beta_fast over the original context stay, those that turn less
    # than beta_slow are divided by factor, and those between are blended.
    beta_fast: float = 32.0
    # See beta_fast.
    beta_slow: float = 1.0
    # The softmax scale is multiplied by (0.1 · mscale · ln factor + 1)².
    mscale: float = 1.0
    # Must equal mscale, as in every released checkpoint.
    mscale_all_dim: float = 1.0

    def check(self) -> None:
        """Raises ConfigError where no rotary embedding follows from the values."""
        for name in ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"model.rope_scaling.{name}={getattr(self, name)} must be positive")
        if self.beta_fast <= self.beta_slow:
            raise ConfigError(
                f"model.rope_scaling.beta_fast={self.beta_fast} must be more than beta_slow={self.beta_slow}, "
                "as the rotations of the fast end are"
            )
        if self.mscale != self.mscale_all_dim:
            raise ConfigError(
                f"model.rope_scaling.mscale={self.mscale} and mscale_all_dim={self.mscale_all_dim} differ: "
                "only equal values are supported, as in every released checkpoint"
            )


@dataclasses.dataclass(unsafe_hash=True)
class ModelConfig(Freezable):
    """A DeepSeek-V3 family transformer. The defaults are the 671B V3.2.

    Source: V3 report §2 and §4.2, V3.2-Exp report §1; the checkpoint's ``config.json``.
    """

    # Rows of the embedding and columns of the output head, unused ones included.
    vocab_size: int = 129280
    # Width of the residual stream.
    hidden_size: int = 7168
    # Layers of the main model, the multi-token-prediction layer not counted.
    num_hidden_layers: int = 61
    # So many layers at the beginning have a dense feed-forward; the others are mixtures of experts.
    first_k_dense_replace: int = 3
    # Multi-token-prediction modules: 0 or 1.
    num_nextn_predict_layers: int = 1
    # Tokens. The longest context; beyond rope_scaling.original_max_position_embeddings it turns YaRN on.
    max_position_embeddings: int = 163840
    # Added to the mean square in every RMSNorm but those of the latents, where it is 1e-6 as in the released code.
    rms_norm_eps: float = 1e-6
    # Standard deviation of the initial weights.
    initializer_range: float = 0.006

    # Multi-head latent attention

    # Query heads, and the key and value heads that the latent is expanded to.
    num_attention_heads: int = 128
    # Width of the query latent.
    q_lora_rank: int = 1536
    # Width of the key-value latent, which is what the cache holds.
    kv_lora_rank: int = 512
    # Width of a head's part without position.
    qk_nope_head_dim: int = 128
    # Width of a head's rotary part; the key's is shared by all heads.
    qk_rope_head_dim: int = 64
    # Width of a head's values.
    v_head_dim: int = 128
    # Base of the rotary frequencies.
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = dataclasses.field(default_factory=RopeScaling)

    # DeepSeek sparse attention: the lightning indexer

    # Query heads of the indexer; they share one key.
    index_n_heads: int = 64
    # Width of an indexer head; its first qk_rope_head_dim are rotary.
    index_head_dim: int = 128
    # Keys that a query attends to. 0: a V3 model, without an indexer, its attention dense.
    index_topk: int = 2048
    # "plain" scores in the compute dtype; "exact" adds the released code's Hadamard rotation and e4m3
    # rounding.
    index_precision: Literal["plain", "exact"] = "plain"

    # Feed-forward: dense SwiGLU in the first layers, mixture of experts in the others

    # Inner width of the dense feed-forward.
    intermediate_size: int = 18432
    # Inner width of one expert.
    moe_intermediate_size: int = 2048
    # Experts that the router chooses from.
    n_routed_experts: int = 256
    # Experts that every token passes through.
    n_shared_experts: int = 1
    # Routed experts a token.
    num_experts_per_tok: int = 8
    # Groups the routed experts are divided into.
    n_group: int = 8
    # Groups that a token may choose its experts from.
    topk_group: int = 4
    # Factor on the sum of the routed experts.
    routed_scaling_factor: float = 2.5
    # Whether a token's expert weights are divided by their sum.
    norm_topk_prob: bool = True

    # Multi-token prediction

    # Which hidden state the multi-token-prediction module reads; public sources do not settle it.
    mtp_input: Literal["before_final_norm", "after_final_norm"] = "before_final_norm"

    # How it is computed: none of these change the result beyond rounding

    # What matrix products are computed in.
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    # What parameters are kept in.
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    # Tokens. Sequences up to this length attend in MHA form under a mask; longer ones gather the selected
    # keys (MQA form).
    dense_attention_max_length: int = 8192
    # Queries that are scored against all keys at a time, at most, in whole 32s: short sequences have smaller blocks.
    attention_block_size: int = 1024
    # What the backward pass computes again, beside each block of attention from its output: nothing; each layer, but
    # attention's output and the products that cost most for their size; attention's output too, which in MQA form is
    # large; all but a layer's input.
    remat: Literal["none", "layer", "attention", "full"] = "layer"
    # One compiled layer in a loop, or each layer compiled for itself: faster steps, longer compilation.
    scan_layers: bool = True
    # On a mesh, how tokens come to the devices that have their experts: ragged sends each pair of a token and an expert
    # (ragged all-to-all); gathered sends all tokens to all (all-gather and reduce-scatter); auto is ragged but on CPUs,
    # where XLA has no such operation and it is acted out, slowly.
    expert_exchange: Literal["auto", "ragged", "gathered"] = "auto"
    # Pairs that a device takes from others at once, where 1 is its own number: the bound of its memory. Where loads
    # are more uneven than that there are more rounds, and nothing is dropped.
    expert_capacity: float = 1.25

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head: the part without position and the rotary part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def has_indexer(self) -> bool:
        """Whether attention is sparse (V3.2) or always dense (V3, V3.1, R1)."""
        return self.index_topk > 0

    @property
    def num_moe_layers(self) -> int:
        """Mixture-of-experts layers of the main model, the MTP layer not counted."""
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def uses_yarn(self) -> bool:
        """YaRN and its softmax factor apply only beyond the original context length."""
        return self.max_position_embeddings > self.rope_scaling.original_max_position_embeddings

    @property
    def softmax_scale(self) -> float:
        """``qk_head_dim^-0.5 · m²`` with ``m = 0.1·mscale·ln(factor) + 1`` under YaRN, else m = 1."""
        scale = self.qk_head_dim**-0.5
        if self.uses_yarn and self.rope_scaling.factor > 1:
            m = 0.1 * self.rope_scaling.mscale_all_dim * math.log(self.rope_scaling.factor) + 1.0
            scale *= m * m
        return scale

    def check(self) -> None:
        """Raises ConfigError for a combination that cannot work, naming field, value and remedy."""
        check_types(self, "model.")
        self._check_ranges()
        self.rope_scaling.check()
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ConfigError(
                f"model.first_k_dense_replace={self.first_k_dense_replace} is more than "
                f"model.num_hidden_layers={self.num_hidden_layers}: use at most {self.num_hidden_layers}"
            )
        if self.num_nextn_predict_layers > 1:
            raise ConfigError(
                f"model.num_nextn_predict_layers={self.num_nextn_predict_layers} must be 0 or 1: "
                "the released models have one multi-token-prediction module"
            )
        if self.num_moe_layers + self.num_nextn_predict_layers == 0:
            raise ConfigError(
                f"model.first_k_dense_replace={self.first_k_dense_replace} leaves no mixture-of-experts layer: "
                f"use at most {self.num_hidden_layers - 1}"
            )
        if self.rope_theta <= 1:
            raise ConfigError(f"model.rope_theta={self.rope_theta} must be more than 1: the models use 10000")
        if self.qk_rope_head_dim % 2:
            raise ConfigError(
                f"model.qk_rope_head_dim={self.qk_rope_head_dim} must be even: rotary embedding turns pairs"
            )
        self._check_routing()
        if self.has_indexer:
            self._check_indexer()

    def _check_ranges(self) -> None:
        may_be_zero = {"first_k_dense_replace", "num_nextn_predict_layers", "index_topk", "n_shared_experts"}
        may_be_zero |= {"dense_attention_max_length"}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in may_be_zero else 1
            if field.type is int and value < least:
                raise ConfigError(f"model.{field.name}={value} must be at least {least}")
            if field.type is float and value <= 0:
                raise ConfigError(f"model.{field.name}={value} must be positive")

    def _check_routing(self) -> None:
        experts, groups = self.n_routed_experts, self.n_group
        if experts % groups:
            divisors = [d for d in range(1, min(experts, 1024) + 1) if experts % d == 0]
            raise ConfigError(
                f"model.n_group={groups} does not divide model.n_routed_experts={experts}: "
                f"use one of {divisors}"
            )
        if self.topk_group > groups:
            raise ConfigError(
                f"model.topk_group={self.topk_group} is more than model.n_group={groups}: "
                f"use at most {groups}"
            )
        if groups > 1 and experts // groups < 2:
            raise ConfigError(
                f"model.n_group={groups} leaves one expert in a group, and a group is ranked by its two "
                f"best: use at most {experts // 2}"
            )
        reachable = self.topk_group * (experts // groups)
        if self.num_experts_per_tok > reachable:
            raise ConfigError(
                f"model.num_experts_per_tok={self.num_experts_per_tok} is more than the {reachable} experts "
                f"in model.topk_group={self.topk_group} groups: use at most {reachable}"
            )

    def _check_indexer(self) -> None:
        if self.index_topk > self.max_position_embeddings:
            raise ConfigError(
                f"model.index_topk={self.index_topk} is more than "
                f"model.max_position_embeddings={self.max_position_embeddings}: use at most that, "
                "or 0 for a model without an indexer"
            )
        if self.index_head_dim < self.qk_rope_head_dim:
            raise ConfigError(
                f"model.index_head_dim={self.index_head_dim} is less than "
                f"model.qk_rope_head_dim={self.qk_rope_head_dim}, which is its rotary part: use at least that"
            )
        if self.index_precision == "exact" and self.index_head_dim & (self.index_head_dim - 1):
            raise ConfigError(
                f"model.index_head_dim={self.index_head_dim} must be a power of two for "
                "model.index_precision=exact, whose Hadamard rotation exists only there"
            )

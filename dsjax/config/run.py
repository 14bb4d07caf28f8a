"""The dataclasses of a run: what is trained, on what, for how long, and what is kept."""

import dataclasses
from typing import Literal

from dsjax.config.errors import ConfigError
from dsjax.config.freeze import Freezable
from dsjax.config.model import ModelConfig


def _check_at_least(room: str, config: object, least: dict[str, float]) -> None:
    for name, bound in least.items():
        value = getattr(config, name)
        if not value >= bound:
            raise ConfigError(f"{room}.{name}={value} must be at least {bound}")


@dataclasses.dataclass(unsafe_hash=True)
class DataConfig(Freezable):
    """Text in, batches out."""

    # Files, folders or globs of UTF-8 text. Empty: the source files of the running Python's standard library.
    paths: tuple[str, ...] = ()
    # A tokenizer.json. Empty: a byte-level BPE of model.vocab_size is trained on the text, once a workdir.
    tokenizer: str = ""
    # Share of the documents held out for evaluation, chosen by a hash of their content.
    heldout_fraction: float = 0.02
    # Whether packed documents are hidden from each other. Pre-training leaves them visible, as the report does.
    isolate_documents: bool = False

    def check(self) -> None:
        """Raises ConfigError for values out of range."""
        if not 0 < self.heldout_fraction < 0.5:
            raise ConfigError(
                f"data.heldout_fraction={self.heldout_fraction} must lie between 0 and 0.5: try 0.02"
            )


@dataclasses.dataclass(unsafe_hash=True)
class OptimizerConfig(Freezable):
    """AdamW and the report's learning-rate shape: warm-up, plateau, cosine, floor, and a last lower floor.

    Source: V3 report §4.2. Steps count optimizer steps; a phase of 0 steps is left out.
    """

    lr: float = 2.2e-4
    warmup_steps: int = 2000
    # Plateau until this step; the cosine then falls until cosine_end_step, to lr_floor.
    cosine_start_step: int = 0
    cosine_end_step: int = 0
    lr_floor: float = 2.2e-5
    # From this step on the rate is lr_last; 0: never.
    last_start_step: int = 0
    lr_last: float = 7.3e-6
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    moment_dtype: Literal["float32", "bfloat16"] = "float32"

    def check(self) -> None:
        """Raises ConfigError for values out of range or phases out of order."""
        least = dict.fromkeys(("lr", "lr_floor", "lr_last", "warmup_steps", "weight_decay"), 0.0)
        _check_at_least("optimizer", self, least)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optimizer.{name}={getattr(self, name)} must lie in [0, 1)")
        for name in ("eps", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"optimizer.{name}={getattr(self, name)} must be positive")
        if self.cosine_end_step:
            if self.cosine_start_step < self.warmup_steps:
                raise ConfigError(
                    f"optimizer.cosine_start_step={self.cosine_start_step} comes before the end of the warm-up: "
                    f"use at least optimizer.warmup_steps={self.warmup_steps}"
                )
            if self.cosine_end_step <= self.cosine_start_step:
                raise ConfigError(
                    f"optimizer.cosine_end_step={self.cosine_end_step} must be more than "
                    f"optimizer.cosine_start_step={self.cosine_start_step}, or 0 for no cosine"
                )
        if self.last_start_step and self.last_start_step < max(self.cosine_end_step, self.warmup_steps):
            raise ConfigError(
                f"optimizer.last_start_step={self.last_start_step} comes before the phases it follows: "
                f"use at least {max(self.cosine_end_step, self.warmup_steps)}, or 0 for none"
            )


@dataclasses.dataclass(unsafe_hash=True)
class TrainConfig(Freezable):
    """How long and on how much, and the weights of the losses. Source: V3 report §4.2, V3.2-Exp report §2.1."""

    steps: int = 1000
    batch_size: int = 8  # sequences a step
    sequence_length: int = 4096  # tokens
    # λ of the multi-token-prediction loss, and its later value from mtp_switch_step on (0: never).
    mtp_loss_weight: float = 0.3
    mtp_loss_weight_late: float = 0.1
    mtp_switch_step: int = 0
    # α of the sequence-wise balance loss, and γ of the router-bias update, which is 0 from bias_freeze_step on.
    balance_loss_weight: float = 1e-4
    bias_update_speed: float = 1e-3
    bias_freeze_step: int = 0
    # Weight of the indexer's KL loss; it reaches the indexer only. No public source gives one.
    indexer_loss_weight: float = 1.0
    # Steps in a row with a non-finite loss or gradient before the run stops with a diagnosis.
    max_bad_steps: int = 10

    def check(self) -> None:
        """Raises ConfigError for values out of range."""
        positive = ("steps", "batch_size", "max_bad_steps")
        _check_at_least("train", self, dict.fromkeys(positive, 1))
        _check_at_least("train", self, {"sequence_length": 2})
        weights = ("mtp_loss_weight", "mtp_loss_weight_late", "balance_loss_weight", "bias_update_speed")
        weights += ("indexer_loss_weight", "mtp_switch_step", "bias_freeze_step")
        _check_at_least("train", self, dict.fromkeys(weights, 0))


@dataclasses.dataclass(unsafe_hash=True)
class EvalConfig(Freezable):
    """Evaluation on held-out text during training, and the sample at the end."""

    every_steps: int = 100
    batches: int = 8  # of train.batch_size sequences
    sample_prompt: str = "def "
    sample_tokens: int = 200
    sample_temperature: float = 0.7
    sample_top_p: float = 0.95

    def check(self) -> None:
        """Raises ConfigError for values out of range."""
        _check_at_least("eval", self, {"every_steps": 1, "batches": 1, "sample_tokens": 0})
        _check_at_least("eval", self, {"sample_temperature": 0})
        if not 0 < self.sample_top_p <= 1:
            raise ConfigError(f"eval.sample_top_p={self.sample_top_p} must lie in (0, 1]")


@dataclasses.dataclass(unsafe_hash=True)
class CheckpointConfig(Freezable):
    """How often the state is saved, and how many are kept."""

    every_steps: int = 100
    keep: int = 2

    def check(self) -> None:
        """Raises ConfigError for values out of range."""
        _check_at_least("checkpoint", self, {"every_steps": 1, "keep": 1})


@dataclasses.dataclass(unsafe_hash=True)
class LogConfig(Freezable):
    """What is written while the run goes on."""

    every_steps: int = 10
    tensorboard: bool = True
    # Compiled programs are kept here between starts; "" turns that off.
    compilation_cache: str = "~/.cache/dsjax/xla"
    # Floating-point operations a second that this machine's devices reach on large matrix products, for the
    # share reported as MFU. 0: known for TPU and NVIDIA data-centre chips, measured once on others.
    peak_flops: float = 0.0

    def check(self) -> None:
        """Raises ConfigError for values out of range."""
        _check_at_least("log", self, {"every_steps": 1, "peak_flops": 0})


@dataclasses.dataclass(unsafe_hash=True)
class RunConfig(Freezable):
    """A whole run: ``python train.py --config=configs/NAME.py`` builds one, overrides it, checks and freezes it."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    seed: int = 0

    def check(self) -> None:
        """Raises ConfigError for the first thing that cannot work, alone or in combination."""
        for room in (self.model, self.data, self.optimizer, self.train, self.eval, self.checkpoint, self.log):
            room.check()
        _check_at_least("config", self, {"seed": 0})
        length, longest = self.train.sequence_length, self.model.max_position_embeddings
        if length > longest:
            raise ConfigError(
                f"train.sequence_length={length} is more than model.max_position_embeddings={longest}: "
                f"use at most {longest}, or raise model.max_position_embeddings"
            )

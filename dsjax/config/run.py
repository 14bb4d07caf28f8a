"""The dataclasses of a run: what is trained, on what, for how long, and what is kept."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

from dsjax.config.errors import ConfigError
from dsjax.config.fields import check_types
from dsjax.config.freeze import Freezable
from dsjax.config.hosts import HostsConfig
from dsjax.config.mesh import MeshConfig
from dsjax.config.model import ModelConfig

# Of the windows, that a set must have at least: the mixture has cycles of ten thousand.
_LEAST_SHARE = 1e-4


def _check_at_least(room: str, config: object, least: Mapping[str, float]) -> None:
    for name, bound in least.items():
        value = getattr(config, name)
        if not value >= bound:
            raise ConfigError(f"{room}.{name}={value} must be at least {bound}")


@dataclasses.dataclass(unsafe_hash=True)
class DataConfig(Freezable):
    """Text in, batches out."""

    # Sets made by python -m dsjax.data.prepare, separated by commas, each with its share of the windows: web=3,code=1.
    # Without a number it is 1.
    sets: tuple[str, ...] = ()
    # Without sets: files, folders or globs of text, JSON lines and parquet, separated by commas; write ? for a comma
    # that belongs to a name. Empty: the source files of the running Python's standard library.
    paths: tuple[str, ...] = ()
    # With paths, a tokenizer.json. Empty: that of the weights that init names, or else a byte-level BPE of
    # model.vocab_size, trained on the text once a workdir.
    tokenizer: str = ""
    # With paths, the share of the documents held out for evaluation, chosen by a hash of their content.
    heldout_fraction: float = 0.02
    # concat: documents one after another, cut where a sequence ends. whole: as many as fit, and only those longer than
    # a sequence are cut, as fine-tuning and long contexts want it.
    packing: Literal["concat", "whole"] = "concat"
    # Whether packed documents are hidden from each other. Pre-training leaves them visible, as the report
    # does; fine-tuning does not.
    isolate_documents: bool = False
    # Share of the documents whose middle is moved to their end, to be filled in (PSM), others every epoch.
    # Source: V3 report §4.1. 0 for fine-tuning.
    fim_rate: float = 0.1

    def check(self) -> None:
        """Raises ConfigError for values out of range, and for what cannot go together."""
        if not 0 < self.heldout_fraction < 0.5:
            raise ConfigError(
                f"data.heldout_fraction={self.heldout_fraction} must lie between 0 and 0.5: try 0.02"
            )
        if not 0 <= self.fim_rate <= 1:
            raise ConfigError(f"data.fim_rate={self.fim_rate} must lie in [0, 1]: 0.1 is the report's")
        for name in ("paths", "tokenizer"):
            if self.sets and getattr(self, name):
                raise ConfigError(
                    f"data.sets={self.sets} and data.{name}={getattr(self, name)!r} are both given: "
                    "prepared sets have their text and tokenizer in them, so leave the other out"
                )
        self.weighted_sets()

    def weighted_sets(self) -> list[tuple[str, float]]:
        """Folders and shares of ``sets``; raises ConfigError for shares that are none."""
        found = []
        for item in self.sets:
            folder, equals, weight = item.rpartition("=")
            if not equals:
                folder, weight = item, "1"
            try:
                share = float(weight)
            except ValueError:
                share = 0.0
            if not folder or not 0 < share < math.inf:
                raise ConfigError(
                    f"data.sets: {item!r} must be a folder, or FOLDER=SHARE with a positive number"
                )
            found.append((folder, share))
        total = sum(share for _, share in found)
        for folder, share in found:
            if not share >= _LEAST_SHARE * total:
                raise ConfigError(
                    f"data.sets: {folder!r} has {share:g} of {total:g}, and less than {_LEAST_SHARE:g} of all comes to "
                    "nothing: give it more, or leave it out"
                )
        return found


@dataclasses.dataclass(unsafe_hash=True)
class InitConfig(Freezable):
    """Where the first weights come from; both empty: random ones. A run that goes on takes its own."""

    # A Hugging Face directory: config.json, index and safetensors. Read straight into the devices.
    hf: str = ""
    # What `python -m dsjax.checkpoint.convert import` wrote, or the workdir of another run: its newest checkpoint.
    checkpoint: str = ""
    # With hf, and a model that has no lightning indexer: give it an untrained one, the start of DSA training.
    new_indexer: bool = False

    def check(self) -> None:
        """Raises ConfigError for what cannot go together."""
        if self.hf and self.checkpoint:
            raise ConfigError(
                f"init.hf={self.hf!r} and init.checkpoint={self.checkpoint!r} are both given: use one"
            )
        if self.new_indexer and not self.hf:
            raise ConfigError(
                "init.new_indexer=true needs init.hf; for an imported checkpoint use `convert import --new-indexer`"
            )


@dataclasses.dataclass(unsafe_hash=True)
class OptimizerConfig(Freezable):
    """AdamW and the report's learning-rate shape: warm-up, plateau, cosine, floor, and a last lower floor.

    Source: V3 report §4.2. Steps count optimizer steps; a phase of 0 steps is left out.
    """

    # Learning rate of the plateau.
    lr: float = 2.2e-4
    # Steps in which the rate rises from 0 to lr.
    warmup_steps: int = 2000
    # Plateau until this step; the cosine then falls until cosine_end_step, to lr_floor.
    cosine_start_step: int = 0
    # The step at which the cosine has reached lr_floor. 0: no cosine.
    cosine_end_step: int = 0
    # Learning rate after the cosine.
    lr_floor: float = 2.2e-5
    # From this step on the rate is lr_last. 0: never.
    last_start_step: int = 0
    # Learning rate of the last phase.
    lr_last: float = 7.3e-6
    # Decay a step of the mean of the gradients.
    beta1: float = 0.9
    # Decay a step of the mean of their squares.
    beta2: float = 0.95
    # Added to the root of the mean square.
    eps: float = 1e-8
    # Share of a weight that is taken off a step, times the learning rate.
    weight_decay: float = 0.1
    # The gradient is scaled down to this global norm.
    clip_norm: float = 1.0
    # What both means are kept in.
    moment_dtype: Literal["float32", "bfloat16"] = "float32"

    def check(self) -> None:
        """Raises ConfigError for values out of range or phases out of order."""
        at_least_zero = ("lr", "lr_floor", "lr_last", "warmup_steps", "weight_decay")
        _check_at_least("optimizer", self, dict.fromkeys(at_least_zero, 0))
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optimizer.{name}={getattr(self, name)} must lie in [0, 1)")
        for name in ("eps", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"optimizer.{name}={getattr(self, name)} must be positive")
        if self.cosine_end_step:
            if self.cosine_start_step < self.warmup_steps:
                raise ConfigError(
                    f"optimizer.cosine_start_step={self.cosine_start_step} comes before the end of the "
                    f"warm-up: use at least optimizer.warmup_steps={self.warmup_steps}"
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
    """How long and on how much, and the weights of the losses.

    Source: V3 report §4.2, V3.2-Exp report §2.1.
    """

    # Optimizer steps.
    steps: int = 1000
    # Sequences a step, over all devices.
    batch_size: int = 8
    # Tokens.
    sequence_length: int = 4096
    # Parts in which a step's sequences are run one after another, their gradients added up: the same step, with less
    # memory for activations.
    accumulation_steps: int = 1
    # λ of the multi-token-prediction loss.
    mtp_loss_weight: float = 0.3
    # λ from mtp_switch_step on.
    mtp_loss_weight_late: float = 0.1
    # The step at which mtp_loss_weight_late takes over. 0: never.
    mtp_switch_step: int = 0
    # α of the sequence-wise balance loss.
    balance_loss_weight: float = 1e-4
    # γ of the router-bias update.
    bias_update_speed: float = 1e-3
    # From this step on the router biases stay as they are. 0: never.
    bias_freeze_step: int = 0
    # Weight of the indexer's KL loss; it reaches the indexer only. No public source gives one.
    indexer_loss_weight: float = 1.0
    # Steps in a row with a non-finite loss or gradient before the run stops with a diagnosis.
    max_bad_steps: int = 10

    @property
    def sequences_at_once(self) -> int:
        """Of a step's sequences those that are run together, over all devices."""
        return self.batch_size // self.accumulation_steps

    def check(self) -> None:
        """Raises ConfigError for values out of range."""
        positive = ("steps", "batch_size", "accumulation_steps", "max_bad_steps")
        _check_at_least("train", self, dict.fromkeys(positive, 1))
        _check_at_least("train", self, {"sequence_length": 2})
        if self.batch_size % self.accumulation_steps:
            raise ConfigError(
                f"train.batch_size={self.batch_size} is not a multiple of "
                f"train.accumulation_steps={self.accumulation_steps}, the parts that it is run in: change one of them"
            )
        weights = ("mtp_loss_weight", "mtp_loss_weight_late", "balance_loss_weight", "bias_update_speed")
        weights += ("indexer_loss_weight", "mtp_switch_step", "bias_freeze_step")
        _check_at_least("train", self, dict.fromkeys(weights, 0))


@dataclasses.dataclass(unsafe_hash=True)
class EvalConfig(Freezable):
    """Evaluation on held-out text during training, and the sample at the end."""

    # Steps between evaluations.
    every_steps: int = 100
    # Batches of train.batch_size / train.accumulation_steps held-out sequences an evaluation.
    batches: int = 8
    # What the sample at the end continues.
    sample_prompt: str = "def "
    # Tokens. 0: no sample.
    sample_tokens: int = 200
    # 0: always the most likely token.
    sample_temperature: float = 0.7
    # Tokens are drawn from the smallest set that has this probability.
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

    # Steps between checkpoints.
    every_steps: int = 100
    # Older ones are deleted.
    keep: int = 2

    def check(self) -> None:
        """Raises ConfigError for values out of range."""
        _check_at_least("checkpoint", self, {"every_steps": 1, "keep": 1})


@dataclasses.dataclass(unsafe_hash=True)
class LogConfig(Freezable):
    """What is written while the run goes on."""

    # Steps between lines of metrics and of progress.
    every_steps: int = 10
    # Whether the metrics also go to WORKDIR/tensorboard.
    tensorboard: bool = True
    # Compiled programs are kept here between starts; "" turns that off.
    compilation_cache: str = "~/.cache/dsjax/xla"
    # Floating-point operations a second that this machine's devices reach on large matrix products, for the
    # share reported as MFU, together. 0: known for TPU and NVIDIA data-centre chips, measured once on others.
    peak_flops: float = 0.0

    def check(self) -> None:
        """Raises ConfigError for values out of range."""
        _check_at_least("log", self, {"every_steps": 1, "peak_flops": 0})


@dataclasses.dataclass(unsafe_hash=True)
class RunConfig(Freezable):
    """A whole run.

    ``python train.py --config=configs/NAME.py`` builds one, overrides it, checks and freezes it.
    """

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    init: InitConfig = dataclasses.field(default_factory=InitConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    hosts: HostsConfig = dataclasses.field(default_factory=HostsConfig)
    # Of the initial weights, the order of the data and the sample.
    seed: int = 0

    def check(self) -> None:
        """Raises ConfigError for the first thing that cannot work, alone or in combination."""
        check_types(self)
        rooms = (self.model, self.init, self.data, self.optimizer, self.train, self.eval)
        for room in (*rooms, self.checkpoint, self.log, self.mesh, self.hosts):
            room.check()
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed} must be at least 0 and less than 2**32")
        length, longest = self.train.sequence_length, self.model.max_position_embeddings
        if length > longest:
            raise ConfigError(
                f"train.sequence_length={length} is more than model.max_position_embeddings={longest}: "
                f"use at most {longest}, or raise model.max_position_embeddings"
            )

"""What ``eval.py`` does: the newest checkpoint of a workdir on its held-out text."""

import json
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh

from dsjax.checkpoint.initial import kept_tokenizer
from dsjax.checkpoint.store import CheckpointStore
from dsjax.checkpoint.workdir import changes_since
from dsjax.config import ConfigError, RunConfig
from dsjax.config.load import Command
from dsjax.data.loader import heldout_batches
from dsjax.data.run_data import data_of_run
from dsjax.evals.heldout import heldout_loss
from dsjax.inference.text import complete
from dsjax.models.transformer import Transformer
from dsjax.parallel import hosts
from dsjax.parallel.mesh import mesh_of_run
from dsjax.parallel.placement import placed


def run(command: Command) -> None:
    """Prints the held-out loss and a sample, and writes the figures to ``WORKDIR/eval.json``.

    ``eval.batches`` says how much of the held-out text is used, the ``eval.sample_*`` fields what is written.
    """
    config, workdir = command
    with hosts.together(config):
        changes_since(config, workdir)  # refuses another model
        _evaluate(config, workdir)


def _evaluate(config: RunConfig, workdir: Path) -> None:
    mesh = mesh_of_run(config)
    model, step = load_model(config, workdir, mesh)
    size, tokenizer = config.model.vocab_size, kept_tokenizer(workdir)
    data = hosts.first_alone(
        lambda: data_of_run(
            config.data, vocab_size=size, workdir=workdir, tokenizer=tokenizer, log=hosts.say
        ),
        "the text is opened",
    )
    batches = heldout_batches(
        data,
        config.data,
        batch_size=config.train.sequences_at_once,
        sequence_length=config.train.sequence_length,
        batches=config.eval.batches,
    )
    loss = heldout_loss(model, batches, data.tokenizer.token_bytes, mesh)
    figures = {
        "step": step,
        "eval/loss": loss.nats_per_token,
        "eval/bits_per_byte": loss.bits_per_byte,
        "tokens": loss.tokens,
    }
    if hosts.is_first():
        (workdir / "eval.json").write_text(json.dumps(figures, indent=2) + "\n")
    hosts.say(
        f"step {step}: {loss.nats_per_token:.4f} nats a token, {loss.bits_per_byte:.4f} bits per byte "
        f"over {loss.tokens:,} held-out tokens"
    )
    if config.eval.sample_tokens:
        hosts.say(complete(model, data.tokenizer, config.eval, seed=config.seed, mesh=mesh))


def load_model(config: RunConfig, workdir: Path, mesh: Mesh | None = None) -> tuple[Transformer, int]:
    """The model of the newest checkpoint in ``workdir``, without its optimizer, and its step.

    Raises ConfigError where there is no checkpoint, or one of another model.
    """
    if not (workdir / "checkpoints").is_dir():
        raise ConfigError(f"--workdir={workdir} holds no checkpoints: name the folder that train.py wrote to")
    store = CheckpointStore(workdir, keep=None)
    step = store.latest_step
    if step is None:
        raise ConfigError(f"--workdir={workdir} holds no finished checkpoint: train for a while first")
    target = placed(jax.eval_shape(lambda: Transformer(config.model, rngs=nnx.Rngs(0))), mesh)
    model = store.restore_part(step, target, prefix="model")
    store.close()
    return model, step

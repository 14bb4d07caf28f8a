"""A run from its configuration to its last checkpoint, plot and sample."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dsjax.checkpoint import workdir as workdirs
from dsjax.checkpoint.initial import Initial, initial_model, kept_tokenizer, open_initial
from dsjax.checkpoint.store import CheckpointStore, has_checkpoint
from dsjax.config import ConfigError, RunConfig
from dsjax.config.load import Command
from dsjax.data.loader import heldout_batches, train_batches, train_windows
from dsjax.data.run_data import RunData, data_of_run
from dsjax.evals.heldout import heldout_loss
from dsjax.inference.text import complete
from dsjax.observe.metrics import MetricsWriter, SilentWriter
from dsjax.observe.model_flops import train_flops_per_token
from dsjax.observe.plots import loss_plot
from dsjax.observe.progress import Progress
from dsjax.observe.throughput import Throughput, peak_flops
from dsjax.parallel import hosts
from dsjax.parallel.mesh import mesh_of_run
from dsjax.parallel.placement import batch_sharding, rows_here, whole_batch
from dsjax.train.state import TrainState, abstract_state, initial_state
from dsjax.train.step import lowered_step
from dsjax.train.stop import Diverged, StopSignal

_MARK = ".shared-"  # begins the name of a file by which processes see that they have one workdir


def run(command: Command) -> None:
    """Trains as the command line says, from where the workdir stands; exits 1 where the run diverged."""
    config, workdir = command
    start = time.perf_counter()
    with hosts.together(config), StopSignal() as stop, _claimed(config, workdir):
        mesh = mesh_of_run(config)
        initial = None if has_checkpoint(workdir) else open_initial(config, workdir)
        use_compilation_cache(config.log.compilation_cache)
        with ThreadPoolExecutor(1) as background:
            # -------------------------------------- compile while text is prepared; sets are there or are not
            opened = _data(config, workdir) if config.data.sets else None
            compiled = background.submit(_compile_train_step, config, mesh)
            data = opened or _data(config, workdir)
            try:
                Run(config, workdir, mesh, initial, data, compiled, stop, start).go()
            except Diverged as diagnosis:
                if hosts.is_first():
                    print(diagnosis, file=sys.stderr)
                sys.exit(1)


@contextlib.contextmanager
def _claimed(config: RunConfig, workdir: Path) -> Iterator[None]:
    """The folder is this run's, of whose processes the first holds it; others find there what it has just left."""
    with workdirs.held(workdir) if hosts.is_first() else contextlib.nullcontext():
        mark = workdir / f"{_MARK}{hosts.from_first(os.urandom(8)).hex()}"
        if hosts.is_first():
            for change in workdirs.claim(config, workdir):
                print(f"changed since the run began: {change}")
            for left in workdir.glob(f"{_MARK}*"):
                left.unlink()
            mark.touch()
        hosts.wait_for_all("the workdir is claimed")
        if not mark.exists():
            raise ConfigError(
                f"--workdir={workdir} is not the folder of process 0: name one that all hosts share, such as a mounted "
                "bucket"
            )
        hosts.wait_for_all("the workdir is shared")
        if hosts.is_first():
            mark.unlink()
        yield


def _data(config: RunConfig, workdir: Path) -> RunData:
    """Prepared by the first process, opened by all."""

    def opened() -> RunData:
        size, tokenizer = config.model.vocab_size, kept_tokenizer(workdir)
        data = data_of_run(config.data, vocab_size=size, workdir=workdir, tokenizer=tokenizer, log=hosts.say)
        if hosts.is_first():
            workdirs.remember_text(data.fingerprint, workdir)
        return data

    return hosts.first_alone(opened, "the text is prepared")


def use_compilation_cache(folder: str) -> None:
    """Keeps compiled programs in ``folder`` from one start to the next; "" turns that off."""
    if folder:
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _compile_train_step(config: RunConfig, mesh: Mesh | None) -> tuple[Any, float]:
    """The compiled step and the seconds that took."""
    start = time.perf_counter()
    compiled = lowered_step(config, mesh).compile()
    return compiled, time.perf_counter() - start


class Run:
    """One training run in its workdir; ``go`` is the story."""

    def __init__(
        self,
        config: RunConfig,
        workdir: Path,
        mesh: Mesh | None,
        initial: Initial | None,
        data: RunData,
        compiled: Future[tuple[Any, float]],
        stop: StopSignal,
        start: float,
    ):
        self.config, self.workdir, self.data, self.stop = config, workdir, data, stop
        self.initial, self.mesh = initial, mesh
        self.compiled, self.start = compiled, start
        self.store = CheckpointStore(workdir, keep=config.checkpoint.keep)
        batch_size, length = config.train.batch_size, config.train.sequence_length
        windows = train_windows(data, config.data, sequence_length=length, seed=config.seed)
        for part, own in zip(data.sets, windows.sets, strict=True):
            hosts.say(f"data: {part.folder}: {own.packing()}")
        self.windows, self.lies = windows, batch_sharding(mesh, batch_size)
        self.heldout = heldout_batches(
            data,
            config.data,
            batch_size=config.train.sequences_at_once,
            sequence_length=length,
            batches=config.eval.batches,
        )
        devices = (
            1 if jax.default_backend() == "cpu" else jax.device_count()
        )  # those of a CPU share its cores
        peak = config.log.peak_flops or devices * peak_flops(jax.devices()[0]).flops_per_second
        self.throughput = Throughput(
            flops_per_token=train_flops_per_token(config.model, config.train.sequence_length),
            peak_flops=peak,
        )
        self.pending: tuple[int, dict[str, jax.Array]] | None = None
        self.bad_in_a_row = 0

    def go(self) -> None:
        """Restores or initialises, trains, and leaves checkpoint, plot and sample behind."""
        config, steps = self.config, self.config.train.steps
        first, state = self._begin()
        size = config.train.batch_size
        batches = train_batches(
            self.windows, batch_size=size, rows=rows_here(self.lies, size), first_batch=first
        )
        with (
            self._open_writer(first) as self.writer,
            Progress(
                steps, first_step=first, every_steps=config.log.every_steps, speaks=hosts.is_first()
            ) as self.progress,
        ):
            # ------------------------------------------------------------ the untrained model
            if first == 0:
                self._evaluate(0, state)
            train_step = self._compiled_step(first)
            self.throughput.window(1)
            self.last_reported = first
            if first >= steps:
                self.progress.say(f"already at step {first} of train.steps={steps}: raise it to go on")
            # ------------------------------------------------------------ the steps
            step = first
            while step < steps and not self.stop.before(step):
                state, metrics = train_step(state, whole_batch(next(batches), self.lies, size))
                step += 1
                self._report()
                self.pending = (step, metrics)
                self._at_intervals(step, state)
            # ------------------------------------------------------------ the end
            self._report()
            self._save(step, state)
            self.store.close()
            if step < steps:
                self._say_how_to_resume(step)
            else:
                self._finish(state)

    def _open_writer(self, first: int) -> MetricsWriter | SilentWriter:
        if not hosts.is_first():
            return SilentWriter()
        return MetricsWriter(self.workdir, tensorboard=self.config.log.tensorboard, resume_step=first or None)

    def _begin(self) -> tuple[int, TrainState]:
        latest = self.store.latest_step
        target = abstract_state(self.config, self.mesh)
        if latest is None:
            if self.initial is None:
                return 0, initial_state(self.config, mesh=self.mesh)
            model = initial_model(self.config, self.initial, target.model)
            hosts.say(f"weights from {self.config.init.hf or self.config.init.checkpoint}")
            return 0, initial_state(self.config, model, mesh=self.mesh)
        state = self.store.restore(latest, target)
        hosts.say(f"resumed from the checkpoint of step {latest}")
        return latest, state

    def _compiled_step(self, first: int) -> Any:
        with self.progress.doing("compiling"):
            train_step, seconds = self.compiled.result()
        ready = {"timing/compile_seconds": seconds, "timing/first_step_after_seconds": self._elapsed()}
        self.writer.write_timing(first, ready)
        self.progress.say(
            f"train step compiled in {seconds:.1f} s; first step {self._elapsed():.1f} s after the start"
        )
        return train_step

    def _elapsed(self) -> float:
        return time.perf_counter() - self.start

    def _report(self) -> None:
        """Writes the metrics of the step before the one under way, and stops a run that has diverged."""
        if self.pending is None:
            return
        (step, device_metrics), self.pending = self.pending, None
        every = self.config.log.every_steps
        metrics = {name: float(value) for name, value in device_metrics.items()}
        if step % every == 0 or step == self.config.train.steps:
            tokens = self.config.train.batch_size * self.config.train.sequence_length
            window = self.throughput.window(tokens * (step - self.last_reported))
            self.last_reported = step
            self.writer.write(step, metrics)
            speed = {"timing/tokens_per_second": window.tokens_per_second, "timing/mfu": window.mfu}
            self.writer.write_timing(step, speed | {"timing/elapsed_seconds": self._elapsed()})
            self.progress.update(step, loss=metrics["train/loss"], tokens_per_second=window.tokens_per_second)
        self.bad_in_a_row = int(metrics["train/skipped_in_a_row"])
        if self.bad_in_a_row:
            self._note_bad_step(step, metrics)

    def _note_bad_step(self, step: int, metrics: dict[str, float]) -> None:
        names = ("train/loss", "train/mtp_loss", "train/balance_loss", "indexer/kl", "train/grad_norm")
        culprits = [f"{name}={metrics[name]}" for name in names if not np.isfinite(metrics[name])]
        culprits = culprits or [f"train/total_loss={metrics['train/total_loss']}"]
        self.progress.say(f"step {step} skipped: {', '.join(culprits)}")
        if self.bad_in_a_row < self.config.train.max_bad_steps:
            return
        self.store.wait()
        saved = self.store.latest_step
        kept = (
            f"the checkpoint of step {saved} is from before them and untouched" if saved else "none was saved"
        )
        raise Diverged(
            f"stopped at step {step}: {self.bad_in_a_row} steps in a row were not finite "
            f"({', '.join(culprits)}, learning rate {metrics['train/lr']:.3g}); {kept}; lower optimizer.lr, "
            "raise optimizer.warmup_steps, or look at the data of these steps"
        )

    def _at_intervals(self, step: int, state: TrainState) -> None:
        """Evaluation and checkpoints, each after the metrics of its step are written."""
        last = step == self.config.train.steps
        evaluate = step % self.config.eval.every_steps == 0 or last
        save = step % self.config.checkpoint.every_steps == 0 and not last
        if evaluate or save:
            self._report()
        with self.throughput.paused():
            if evaluate:
                self._evaluate(step, state)
            if save:
                self._save(step, state)

    def _evaluate(self, step: int, state: TrainState) -> None:
        with self.progress.doing("evaluating"):
            loss = heldout_loss(state.model, self.heldout, self._token_bytes(), self.mesh)
        self.writer.write(step, {"eval/loss": loss.nats_per_token, "eval/bits_per_byte": loss.bits_per_byte})
        untrained = "" if step else " (before training)" if self.initial else " (untrained)"
        self.progress.say(
            f"step {step}: held-out loss {loss.nats_per_token:.3f} nats a token, "
            f"{loss.bits_per_byte:.3f} bits per byte{untrained}"
        )

    def _token_bytes(self) -> np.ndarray:
        return self.data.tokenizer.token_bytes

    def _save(self, step: int, state: TrainState) -> None:
        """Starts a checkpoint, unless the last steps were skipped: then the one before them stays the newest."""
        if step and not self.bad_in_a_row:
            with self.progress.doing("saving"):
                self.store.save(step, state)

    def _say_how_to_resume(self, step: int) -> None:
        name = self.stop.received.name if self.stop.received else "stopped"
        saved = f"saved at step {self.store.latest_step}" if self.store.latest_step else "nothing to save yet"
        self.progress.say(f"{name}: {saved}; run the same command again to go on")

    def _finish(self, state: TrainState) -> None:
        settings = self.config.eval
        if hosts.is_first():
            loss_plot(self.workdir / "metrics.jsonl", self.workdir / "loss.png")
        if settings.sample_tokens:
            with self.progress.doing("sampling"):
                text = complete(
                    state.model, self.data.tokenizer, settings, seed=self.config.seed, mesh=self.mesh
                )
            if hosts.is_first():
                (self.workdir / "sample.txt").write_text(text + "\n", encoding="utf-8")
            self.progress.say(f"\n----- sample -----\n{text}\n------------------\n")
        self.progress.say(
            f"done in {self._elapsed():.0f} s: checkpoints, metrics and loss.png in {self.workdir}"
        )

"""Who does the tasks of a plan: this process, processes of this machine, or a cluster; the result is the same bytes.

A cluster needs a file system that all of its machines see under the same name.
"""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from multiprocessing.connection import wait as wait_for_end
from pathlib import Path
from typing import Any, Protocol

from dsjax.config import ConfigError
from dsjax.data.plan import Plan, load_plan
from dsjax.data.readers import needed
from dsjax.data.stages import STAGES, Stage

_POLL_SECONDS = 0.2


class Bar(Protocol):
    """Shows how far a stage is."""

    def advance(self, size_bytes: int, *, was_there: bool = False) -> None:
        """Tells that so much more is done, or that an earlier start did it."""
        ...


Watch = Callable[
    [str, int], AbstractContextManager[Bar]
]  # what is being done, and how many bytes of work that is


def run_here(plan: Plan, watch: Watch) -> None:
    """Does the work in this process, on all cores where the tokenizer uses them."""
    for stage, pending in _stages_to_do(plan):
        with _begun(stage, plan, pending, watch) as bar:
            for task in pending:
                stage.run(plan, task, bar.advance)


def run_processes(plan: Plan, watch: Watch, workers: int) -> None:
    """Does it in so many processes of this machine, which end with this one.

    Errors: ConfigError for what a task raises, and where a process is killed.
    """
    context = multiprocessing.get_context("spawn")
    done = context.Value("q", 0)
    try:
        with ProcessPoolExecutor(workers, context, _begin_worker, (done,)) as pool:
            try:
                for stage, pending in _stages_to_do(plan):
                    with _begun(stage, plan, pending, watch) as bar:
                        if stage.tasks(plan) == 1:
                            stage.run(plan, 0, bar.advance)
                            continue
                        done.value = 0
                        _watched(
                            [pool.submit(_work, plan.folder, stage.name, task) for task in pending], done, bar
                        )
            except BaseException:
                # Else the pool would wait for tasks under way, which may take minutes.
                for process in multiprocessing.active_children():
                    process.terminate()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    except BrokenProcessPool:
        raise ConfigError(
            "a worker process was killed, perhaps for want of memory: run the same command again, with fewer workers, "
            "and it goes on where it was"
        ) from None


def _stages_to_do(plan: Plan) -> Iterator[tuple[Stage, list[int]]]:
    """One after another, the stages that have tasks which no earlier start did, and these."""
    for stage in STAGES:
        if pending := [task for task in range(stage.tasks(plan)) if not stage.is_done(plan, task)]:
            yield stage, pending


@contextlib.contextmanager
def _begun(stage: Stage, plan: Plan, pending: list[int], watch: Watch) -> Iterator[Bar]:
    """A bar for a stage, on which what is done already is shown."""
    sizes = [stage.work_bytes(plan, task) for task in range(stage.tasks(plan))]
    with watch(stage.doing, sum(sizes)) as bar:
        bar.advance(sum(sizes) - sum(sizes[task] for task in pending), was_there=True)
        yield bar


def _watched(futures: list[Future[None]], done: Any, bar: Bar) -> None:
    """Waits for tasks while the bar moves; raises what the first of them raised."""
    shown = 0
    waiting = set(futures)
    while waiting:
        finished, waiting = wait(waiting, _POLL_SECONDS, FIRST_EXCEPTION)
        for future in finished:
            future.result()
        bar.advance(done.value - shown)
        shown = done.value


_done: Any = None


def _begin_worker(done: Any) -> None:
    global _done
    _done = done
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends without a word: the parent says what there is to say
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent cannot end its workers, which would write where the next start does."""
    parent = multiprocessing.parent_process()
    if parent:
        wait_for_end([parent.sentinel])
        os._exit(1)


def _work(folder: Path, name: str, task: int) -> None:
    """Does a task of the stage of that name, unless it is done."""

    def report(size_bytes: int) -> None:
        if _done is not None:
            with _done.get_lock():
                _done.value += size_bytes

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker has its core
    (stage,) = (stage for stage in STAGES if stage.name == name)
    plan = load_plan(folder)
    if not stage.is_done(plan, task):
        stage.run(plan, task, report)


# ---------------------------------------------------------------- clusters


def run_ray(plan: Plan, watch: Watch, address: str) -> None:
    """Does it on a Ray cluster, or on one that is started on this machine where ``address`` is ``local``.

    Errors: ConfigError where Ray is not installed or cannot be reached, and for what a task raises.
    """
    ray = needed("ray", "--engine=ray")
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except ConnectionError as error:
        raise ConfigError(f"--ray-address={address} cannot be reached ({error}): start Ray there") from None
    work = ray.remote(num_cpus=1)(_work)
    try:
        for stage, pending in _stages_to_do(plan):
            with _begun(stage, plan, pending, watch) as bar:
                waiting = {work.remote(plan.folder, stage.name, task): task for task in pending}
                while waiting:
                    (first,), _ = ray.wait(list(waiting))
                    ray.get(first)
                    bar.advance(stage.work_bytes(plan, waiting.pop(first)))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ConfigError):
            raise error.cause from None
        raise
    finally:
        ray.shutdown()


class Step:
    """A stage as a step of a datatrove pipeline, which any of its executors runs: a task is a rank."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name

    def __call__(self, documents: object = None, rank: int = 0, world_size: int = 1) -> None:
        """Does a task; documents come from the folder."""
        _work(self.folder, self.name, rank)


def submit_slurm(plan: Plan, *, partition: str, time_limit: str, memory_gb: int, at_once: int) -> list[str]:
    """Submits the stages as Slurm jobs, each after the one before, by datatrove; returns the ids of these jobs.

    Logs and scripts stand in ``FOLDER.slurm``.

    Errors: ConfigError where Slurm does not take a job.
    """
    executor_of = needed("datatrove.executor.slurm", "--engine=slurm").SlurmPipelineExecutor
    jobs = []
    for stage in STAGES:
        job = executor_of(
            pipeline=[Step(plan.folder, stage.name)],
            tasks=stage.tasks(plan),
            time=time_limit,
            partition=partition,
            mem_per_cpu_gb=memory_gb,
            workers=at_once,
            job_name=f"dsjax-{stage.name}",
            logging_dir=str(plan.folder.with_name(f"{plan.folder.name}.slurm") / stage.name),
            skip_completed=False,  # results say what is done
            depends=jobs[-1] if jobs else None,
            env_command=f"export PATH={Path(sys.executable).parent}:$PATH",
        )
        try:
            job.run()
        except FileNotFoundError:
            raise ConfigError(
                "--engine=slurm: sbatch is not on this machine: run this where jobs are submitted"
            ) from None
        except subprocess.CalledProcessError as error:
            raise ConfigError(
                f"--engine=slurm: {' '.join(error.cmd)} failed: see what it says above"
            ) from None
        jobs.append(job)
    return [job.job_id for job in jobs]

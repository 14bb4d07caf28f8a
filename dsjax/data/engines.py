"""Who does the tasks of a plan: this process, or processes of this machine; the result is the same bytes."""

import contextlib
import multiprocessing
import os
import signal
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
    for stage, pending in stages_to_do(plan):
        with begun(stage, plan, pending, watch) as bar:
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
                for stage, pending in stages_to_do(plan):
                    with begun(stage, plan, pending, watch) as bar:
                        if stage.tasks(plan) == 1:
                            stage.run(plan, 0, bar.advance)
                            continue
                        done.value = 0
                        _watched(
                            [pool.submit(do_task, plan.folder, stage.name, task) for task in pending],
                            done,
                            bar,
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


def stages_to_do(plan: Plan) -> Iterator[tuple[Stage, list[int]]]:
    """One after another, the stages that have tasks which no earlier start did, and these."""
    for stage in STAGES:
        if pending := [task for task in range(stage.tasks(plan)) if not stage.is_done(plan, task)]:
            yield stage, pending


@contextlib.contextmanager
def begun(stage: Stage, plan: Plan, pending: list[int], watch: Watch) -> Iterator[Bar]:
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


def do_task(folder: Path, name: str, task: int) -> None:
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

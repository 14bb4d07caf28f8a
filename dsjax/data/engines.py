"""Who does the tasks of a plan: this process, or processes of this machine; the result is the same bytes."""

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
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
    pool: list[Connection] = []
    try:
        for stage, pending in stages_to_do(plan):
            with begun(stage, plan, pending, watch) as bar:
                if stage.tasks(plan) == 1:
                    stage.run(plan, 0, bar.advance)
                    continue
                pool = pool or [_start_worker(context, done) for _ in range(workers)]
                done.value = 0
                _do_tasks(pool, [(plan.folder, stage.name, task) for task in pending], done, bar)
    finally:
        # They have nothing to do, or what they do takes minutes and nobody wants it any more.
        for process in multiprocessing.active_children():
            process.terminate()
            process.join()


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


def _do_tasks(pool: list[Connection], tasks: Iterable[tuple], done: Any, bar: Bar) -> None:
    """Has the workers do tasks, one at a time each, while the bar moves; raises what the first to fail raised."""
    left, shown = iter(tasks), 0
    busy: set[Connection] = set()

    def give(worker: Connection) -> None:
        if task := next(left, None):
            with _alive():
                worker.send(task)
            busy.add(worker)

    for worker in pool:
        give(worker)
    while busy:
        ready = wait(busy, _POLL_SECONDS)
        for worker in [worker for worker in busy if worker in ready]:
            busy.remove(worker)
            with _alive():
                error = worker.recv()
            if error:
                raise error
            give(worker)
        now = done.get_obj().value  # without its lock, which a killed worker may have held
        bar.advance(now - shown)
        shown = now


@contextlib.contextmanager
def _alive() -> Iterator[None]:
    """Talking to a worker; raises ConfigError where it is not there any more."""
    try:
        yield
    except (EOFError, OSError):
        raise ConfigError(
            "a worker process was killed, perhaps for want of memory: run the same command again, with fewer workers, "
            "and it goes on where it was"
        ) from None


def _start_worker(context: SpawnContext, done: Any) -> Connection:
    """A process that does the tasks sent to it, and answers each with what it raised or None."""
    ours, its = context.Pipe()
    context.Process(target=_work, args=(its, done), daemon=True).start()
    its.close()
    return ours


_done: Any = None


def _work(tasks: Connection, done: Any) -> None:
    global _done
    _done = done
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it, and says what there is to say
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            task = tasks.recv()
        except EOFError:  # the parent has ended while there was nothing to do
            return
        try:
            do_task(*task)
        except Exception as error:
            error.add_note(traceback.format_exc())
            tasks.send(error)
        else:
            tasks.send(None)


def _end_with_parent() -> None:
    """A killed parent cannot end its workers, which would write where the next start does."""
    parent = multiprocessing.parent_process()
    if parent:
        wait([parent.sentinel])
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

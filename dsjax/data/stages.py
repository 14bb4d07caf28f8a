"""The work of preparing a set, in the order of the stages; each consists of tasks that depend on earlier stages only.

A task writes its result whole, so one that was interrupted is done again and one that was finished is not.
"""

from collections.abc import Callable
from typing import NamedTuple

from dsjax.data.cleaning import clean
from dsjax.data.manifest import finish
from dsjax.data.plan import Plan
from dsjax.data.selection import bytes_to_compare, select
from dsjax.data.tokenising import bytes_to_tokenise, make_tokenizer, tokenise

Report = Callable[[int], None]  # told the bytes of work that are done


class Stage(NamedTuple):
    """One step for all documents.

    ``run`` does a task; ``result`` is the last file that it writes, with the task's number in it where there are
    several.
    """

    name: str
    doing: str
    result: str
    run: Callable[[Plan, int, Report], None]
    work_bytes: Callable[[Plan, int], int]  # of a task, what ``run`` reports in all

    def tasks(self, plan: Plan) -> int:
        """How many tasks it has."""
        return len(plan.tasks) if "{" in self.result else 1

    def is_done(self, plan: Plan, task: int) -> bool:
        """Whether an earlier start finished a task."""
        return (plan.folder / self.result.format(task)).exists()


STAGES = (
    Stage("clean", "reading and filtering", "work/clean-{:05}.json", clean, Plan.size_bytes),
    Stage(
        "select",
        "looking for duplicates",
        "work/sides.json",
        lambda plan, task, report: select(plan, report),
        lambda plan, task: bytes_to_compare(plan),
    ),
    Stage(
        "tokenizer",
        "making the tokenizer",
        "tokenizer.json",
        lambda plan, task, report: make_tokenizer(plan),
        lambda plan, task: 0,
    ),
    Stage("tokenise", "tokenising", "work/tokens-{:05}.json", tokenise, bytes_to_tokenise),
    Stage(
        "finish",
        "writing the manifest",
        "manifest.json",
        lambda plan, task, report: finish(plan),
        lambda plan, task: 0,
    ),
)

"""Preparing a set in the test's own process, as far as a test needs it."""

from pathlib import Path

from dsjax.data.plan import Plan, begin
from dsjax.data.settings import Names, Settings
from dsjax.data.stages import STAGES
from dsjax.data.tokenizer import Tokenizer


def begun(folder: Path, *inputs: Path, given: Tokenizer | None = None, **settings) -> Plan:
    """The plan of a new set in ``folder``, of everything in ``inputs`` if no setting says otherwise."""
    folder.mkdir()
    everything = {"quality": "none", "keep_near_duplicates": True, "vocab_size": 0 if given else 300}
    wanted = Settings(**{"inputs": tuple(map(str, inputs)), **everything, **settings})
    return begin(folder, wanted, Names(), given)


def done(plan: Plan, last: str) -> Plan:
    """Does the stages up to the one that is called ``last``; each task must report the work that was announced."""
    for stage in STAGES[: [stage.name for stage in STAGES].index(last) + 1]:
        for task in range(stage.tasks(plan)):
            told: list[int] = []
            stage.run(plan, task, told.append)
            assert sum(told) == stage.work_bytes(plan, task)
    return plan


def write_files(folder: Path, *texts: str) -> Path:
    """``000.txt``, ``001.txt`` and so on, in the order of the texts."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:03}.txt").write_bytes(text.encode())
    return folder

"""What is told of batches: kinds of tokens, the account, the picture."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from dsjax.data.documents import Controls
from dsjax.data.show import coloured, tokens_of
from dsjax.data.tokenizer import CONTROL_TOKENS, train_tokenizer
from dsjax.data.windows import Batch, ConcatWindows, PackedWindows, Shape

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["def middle(): return 1\n" * 50], 300)


@pytest.fixture(scope="module")
def controls(tokenizer):
    names = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
    ids = [tokenizer.id_of(name) for name in names]
    return Controls(tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, *ids)


class Texts:
    """Documents in memory."""

    def __init__(self, tokenizer, texts: list[str]):
        self.stored = tokenizer.encode_documents(texts)
        self.lengths = np.array([len(tokens) for tokens in self.stored])

    def text(self, number: int, start: int, stop: int) -> np.ndarray:
        return self.stored[number][start:stop]


def window_of(*targets_and_mask: tuple[int, int, int], first: int) -> Batch:
    """A window from its first token, and target, mask and segment of each place."""
    targets, mask, segments = (np.array(column) for column in zip(*targets_and_mask, strict=True))
    tokens = np.concatenate([[first], targets[:-1]])
    return Batch(tokens=tokens, targets=targets, segment_ids=segments, positions=tokens, loss_mask=mask)


def test_parts_of_a_moved_document_are_told_apart(controls):
    bos, eos, _, begin, hole, end = controls
    stream = [bos, begin, 100, 101, hole, 102, end, 103, 104, eos, bos, 105]
    window = window_of(*[(token, 1, 1) for token in stream[1:]], first=stream[0])
    tokens = list(tokens_of(window, controls))
    assert [token.id for token in tokens] == stream
    parts = {token.id: token.part for token in tokens if token.id >= 100}
    assert parts == {100: "prefix", 101: "prefix", 102: "suffix", 103: "middle", 104: "middle", 105: ""}
    assert [token.document for token in tokens] == [0] * 10 + [1] * 2


@pytest.mark.parametrize(
    ("first_control", "part"), [("fim_hole", "prefix"), ("fim_end", "suffix"), ("eos", "")]
)
def test_a_document_that_began_before_the_window_is_told_by_what_follows(controls, first_control, part):
    window = window_of((101, 1, 1), (getattr(controls, first_control), 1, 1), (102, 1, 1), first=100)
    assert [token.part for token in tokens_of(window, controls)][:2] == [part] * 2


def test_masked_tokens_and_padding_are_told(controls):
    bos, eos, pad = controls[:3]
    window = window_of(
        (100, 1, 1), (eos, 1, 1), (bos, 0, 2), (101, 0, 2), (102, 1, 2), (pad, 0, 0), first=bos
    )
    window["tokens"][5] = pad
    tokens = list(tokens_of(window, controls))
    assert [(token.id, token.masked) for token in tokens if not token.padding] == [
        (bos, False),
        (100, False),
        (eos, False),
        (bos, True),
        (101, True),
        (102, False),
    ]
    assert sum(token.padding for token in tokens) == 1


@pytest.mark.parametrize("kind", [ConcatWindows, PackedWindows])
def test_a_window_is_printed_whole(tokenizer, controls, kind):
    texts = ["def first(): return 1\n", "def second(): return 22\n", "def third(): return 333\n"]
    windows = kind(Texts(tokenizer, texts), Shape(200, True, 0.0, 0), controls)
    assert windows.count == 1
    console = Console(file=io.StringIO(), width=500, force_terminal=False)
    console.print(coloured(windows.window(0, 0), tokenizer, controls))
    said = console.file.getvalue()
    bos, eos = CONTROL_TOKENS[:2]
    for text in texts:
        assert f"{bos}{text}{eos}" in said
    assert "of padding]" in said


def show(workdir: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "dsjax.data.show", "--config=configs/tiny.py", f"--workdir={workdir}"]
    return subprocess.run([*program, *flags], cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_the_command_prints_the_sequences_the_account_and_the_picture(tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(30):
        (tmp_path / "text" / f"{number}.py").write_text(f"def f{number}():\n    return {number}\n" * 20)
    flags = [f"--config.data.paths={tmp_path}/text", "--config.data.fim_rate=0.5", "--rows=2", "--windows=50"]
    done = show(tmp_path / "run", *flags)
    assert done.returncode == 0, done.stderr
    for said in (
        "batch 0, row 1: ",
        "<｜fim▁begin｜>",
        "the first 50 windows",
        "100.00%",
        "windows an epoch",
    ):
        assert said in done.stdout
    assert (tmp_path / "run/data.png").read_bytes().startswith(b"\x89PNG")
    again = show(tmp_path / "run", "--rows=1")
    assert again.returncode == 0, again.stderr  # what the run has is shown, whatever data.paths says


def test_weights_without_data_are_refused_with_the_way_out(tmp_path):
    done = show(tmp_path / "run", "--config.init.hf=x")
    assert done.returncode == 2
    assert "start train.py first, or name it as data.tokenizer" in done.stderr

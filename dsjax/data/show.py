"""What the model will see: ``python -m dsjax.data.show --config=configs/tiny.py --workdir=/tmp/run1``.

Prints training sequences as they will come, with documents, moved middles and masked tokens in colours, then what the
mixture consists of; draws the documents' lengths in WORKDIR/data.png. Takes the flags of train.py, and

  --first       the first batch to print (default 0)
  --rows        how many sequences (default 4)
  --windows     how many windows the account is taken over (default 1000)
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dsjax.config import ConfigError, RunConfig, load
from dsjax.config.load import Command
from dsjax.data.documents import Controls
from dsjax.data.loader import controls_of, train_windows
from dsjax.data.mixture import Mixture
from dsjax.data.prepared_set import open_set
from dsjax.data.run_data import RunData, data_of_run, only
from dsjax.data.tokenizer import Tokenizer
from dsjax.data.windows import Batch
from dsjax.observe.plots import length_histogram

_DOCUMENTS = ("white", "cyan")  # in turn
_PARTS = {"prefix": "green", "suffix": "blue", "middle": "yellow"}
_CONTROL, _MASKED, _PADDING = "bold magenta", "strike red", "dim"


class Token(NamedTuple):
    """One of a sequence, and what is to be told of it."""

    id: int
    document: int  # of those in the window, from 0
    part: str  # prefix, suffix or middle of a document whose middle was moved, or ""
    masked: bool  # that no loss falls on predicting it
    padding: bool


def run(command: Command) -> None:
    """Prints and draws what the command line asks for."""
    config, workdir = command
    data = _data(config, command)
    length = config.train.sequence_length
    windows = train_windows(data, config.data, sequence_length=length, seed=config.seed)
    controls = controls_of(data.tokenizer, config.data.fim_rate)
    console = Console(highlight=False)
    first = flags.FLAGS.first * config.train.batch_size
    for number in range(first, first + flags.FLAGS.rows):
        batch, row = divmod(number, config.train.batch_size)
        window = windows[number]
        source = data.sets[windows.place(number)[0]].folder
        console.rule(Text(f"batch {batch}, row {row}: {source}"), align="left")
        console.print(coloured(window, data.tokenizer, controls), soft_wrap=True)
    console.rule()
    console.print(_legend())
    console.print(_account(data, windows, controls, flags.FLAGS.windows))
    for part, own in zip(data.sets, windows.sets, strict=True):
        console.print(f"{part.folder}: {own.packing()}", markup=False, soft_wrap=True)
    picture = workdir / "data.png"
    length_histogram({str(part.folder): part.train.lengths for part in data.sets}, length, picture)
    console.print(f"lengths of documents: {picture}", markup=False, soft_wrap=True)


def _data(config: RunConfig, command: Command) -> RunData:
    folder = command.workdir / "data"
    if not config.data.sets and (folder / "manifest.json").exists():
        return only(open_set(folder))
    if not config.data.sets and not config.data.tokenizer and (config.init.hf or config.init.checkpoint):
        raise ConfigError(
            f"--workdir={command.workdir} has no data yet, whose tokenizer is that of the weights: start train.py "
            "first, or name it as data.tokenizer"
        )
    return data_of_run(config.data, vocab_size=config.model.vocab_size, workdir=command.workdir)


def tokens_of(window: Batch, controls: Controls) -> Iterator[Token]:
    """The tokens of a window in order: its inputs, and the targets that no input repeats.

    A document that began before the window is taken for one whose middle is not moved until a token says otherwise.
    """
    tokens, targets, mask = (window[name].tolist() for name in ("tokens", "targets", "loss_mask"))
    real = (window["segment_ids"] > 0).tolist()
    document, part, masked = 0, _first_part([*tokens, targets[-1]], controls), True
    for place, token in enumerate(tokens):
        if token == controls.bos and place:
            document += 1
        if token in (controls.bos, controls.eos):
            part = ""
        yield Token(token, document, part, masked and place > 0, not real[place])
        part = _NEXT_PART[controls.index(token)] if token in controls and token != -1 else part
        last = place + 1 == len(tokens)
        masked = not mask[place]
        if real[place] and (last or tokens[place + 1] != targets[place]):
            yield Token(targets[place], document, part, masked, False)
            masked = True


# By the places of Controls: what follows that token.
_NEXT_PART = ("", "", "", "prefix", "suffix", "middle")


def _first_part(tokens: list[int], controls: Controls) -> str:
    """Of the document that a window begins in: the part that ends with the first control token."""
    for token in tokens:
        if token in (controls.fim_hole, controls.fim_end):
            return "prefix" if token == controls.fim_hole else "suffix"
        if token in (controls.bos, controls.eos, controls.fim_begin):
            break
    return ""


def coloured(window: Batch, tokenizer: Tokenizer, controls: Controls) -> Text:
    """A window as text, each kind of token in its style."""

    def style(token: Token) -> str:
        if token.padding:
            return _PADDING
        if token.id in tokenizer.control_ids:
            return _CONTROL
        own = _PARTS.get(token.part) or _DOCUMENTS[token.document % len(_DOCUMENTS)]
        return f"{own} {_MASKED}" if token.masked else own

    text = Text()
    for (document, how), group in itertools.groupby(
        tokens_of(window, controls), lambda t: (t.document, style(t))
    ):
        ids = [token.id for token in group]
        if how == _PADDING:
            text.append(f"[{len(ids)} of padding]", how)
            continue
        if document and how == _CONTROL and ids[0] == controls.bos:
            text.append("\n")
        text.append(tokenizer.decode(ids, skip_control=False), how)
    return text


def _legend() -> Text:
    text = Text()
    for name, style in zip(("document", "next document"), _DOCUMENTS, strict=True):
        text.append(f"{name} ", style)
    for part, style in _PARTS.items():
        text.append(f"{part} ", style)
    text.append("control ", _CONTROL).append("no loss", _MASKED).append(" ").append("padding", _PADDING)
    return text


def _account(data: RunData, windows: Mixture, controls: Controls, count: int) -> Table:
    """Of the first windows, by set: share, the one wanted, documents begun, moved middles, padding."""
    table = Table(box=None, pad_edge=False, title=f"the first {count:,} windows", title_justify="left")
    for column in ("windows", "share", "wanted", "tokens", "begun", "moved", "padding", "no loss", "set"):
        table.add_column(column, justify="left" if column == "set" else "right", overflow="fold")
    sums = np.zeros((len(data.sets), 6), np.int64)
    for number in range(count):
        window = windows[number]
        real, tokens = window["segment_ids"] > 0, window["tokens"]
        begun = int(np.sum(real & (tokens == controls.bos)))
        moved = int(np.sum(real & (tokens == controls.fim_begin)))
        masked = int(np.sum(real & (window["loss_mask"] == 0)))
        sums[windows.place(number)[0]] += (1, real.sum(), begun, moved, (~real).sum(), masked)
    wanted = np.array(data.weights) / sum(data.weights)
    for part, share, own in zip(data.sets, wanted, sums.tolist(), strict=True):
        had, tokens, begun, moved, padding, masked = own
        shares = (moved / max(begun, 1), padding / max(tokens + padding, 1), masked / max(tokens, 1))
        told = (
            f"{had / count:.2%}",
            f"{share:.2%}",
            f"{tokens:,}",
            f"{begun:,}",
            *(f"{x:.2%}" for x in shares),
        )
        table.add_row(f"{had:,}", *told, Text(str(part.folder)))
    return table


if __name__ == "__main__":
    flags.DEFINE_integer("first", 0, "the first batch to print", lower_bound=0)
    flags.DEFINE_integer("rows", 4, "how many sequences to print", lower_bound=0)
    flags.DEFINE_integer("windows", 1000, "how many windows the account is taken over", lower_bound=1)
    load.main(run, about=__doc__)

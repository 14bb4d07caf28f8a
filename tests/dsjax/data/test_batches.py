"""Batches of a run: mixture, moved middles, packing, processes, resumption; held-out batches."""

import ast
import collections
import itertools
import json
import random
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from moved_middles import text_of

import dsjax.data
from dsjax.config import ConfigError, DataConfig
from dsjax.data.loader import controls_of, heldout_batches, train_batches, train_windows
from dsjax.data.mixture import Mixture
from dsjax.data.prepared_set import PreparedSet
from dsjax.data.run_data import RunData
from dsjax.data.shards import ShardWriter
from dsjax.data.token_set import TokenSet
from dsjax.data.tokenizer import CONTROL_TOKENS, Tokenizer, train_tokenizer
from dsjax.data.windows import Batch

LENGTH = 64
DTYPES = {
    "tokens": np.int32,
    "targets": np.int32,
    "segment_ids": np.int32,
    "positions": np.int32,
    "loss_mask": np.float32,
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([""], 266)


def token_set(folder: Path, name: str, lengths: list[int], first: int) -> TokenSet:
    """Documents of these lengths, each of its own token, ``first`` and on."""
    writer = ShardWriter(folder, name)
    for number, length in enumerate(lengths):
        writer.append(np.full(length, first + number, np.int32))
    writer.close()
    return TokenSet(folder, [name])


@pytest.fixture(scope="module")
def data(tmp_path_factory, tokenizer) -> RunData:
    """Two sets of 300 and 80 documents, short ones and some longer than a window, in shares of 0.7 and 0.3."""
    rng = np.random.default_rng(0)
    sets = []
    for number, count in enumerate((300, 80)):
        folder = tmp_path_factory.mktemp(f"set{number}")
        lengths = rng.integers(1, 3 * LENGTH // (number + 1), count).tolist()
        first = 1000 * (number + 1)
        train = token_set(folder, "train", lengths, first)
        sets.append(
            PreparedSet(folder, tokenizer, train, token_set(folder, "heldout", lengths[:20], first), {})
        )
    return RunData(tokenizer, tuple(sets), (0.7, 0.3), "")


def windows_of(data: RunData, *, seed: int = 0, length: int = LENGTH, **fields) -> Mixture:
    config = DataConfig(**{"fim_rate": 0.5, "isolate_documents": True, **fields})
    return train_windows(data, config, sequence_length=length, seed=seed)


def assert_same(one: Batch, two: Batch) -> None:
    assert one.keys() == two.keys() == DTYPES.keys()
    for name, dtype in DTYPES.items():
        assert one[name].dtype == dtype
        np.testing.assert_array_equal(one[name], two[name])


def taken(
    windows: Mixture, count: int, process: int = 0, processes: int = 1, first_batch: int = 0
) -> list[Batch]:
    each = 8 // processes
    rows = range(process * each, (process + 1) * each)
    batches = train_batches(windows, batch_size=8, rows=rows, first_batch=first_batch)
    return list(itertools.islice(batches, count))


@pytest.mark.parametrize("packing", ["concat", "whole"])
@pytest.mark.parametrize("step", random.Random(5).sample(range(1, 60), 3))
def test_a_fresh_iterator_continues_exactly(data, packing, step):
    """60 batches of 8 are several epochs of either set."""
    windows = windows_of(data, packing=packing)
    assert 2 * windows.sets[1].count < 60 * 8 * 0.3
    whole = taken(windows, 60)
    resumed = train_batches(windows_of(data, packing=packing), batch_size=8, first_batch=step)
    for batch in whole[step:]:
        assert_same(next(resumed), batch)


@pytest.mark.parametrize("packing", ["concat", "whole"])
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_every_batch(data, packing, processes):
    alone = taken(windows_of(data, packing=packing), 17)[5:]
    parts = [
        taken(windows_of(data, packing=packing), 12, process=index, processes=processes, first_batch=5)
        for index in range(processes)
    ]
    for number, batch in enumerate(alone):
        together = {name: np.concatenate([part[number][name] for part in parts]) for name in DTYPES}
        assert_same(Batch(**together), batch)


def documents_in(
    windows: Mixture, rows: list[Batch], tokenizer: Tokenizer
) -> collections.Counter[tuple[int, int]]:
    """How many tokens of which document stand in windows as targets; each document has a token of its own."""
    tokens = np.concatenate([row["targets"][row["segment_ids"] > 0] for row in rows])
    found = tokens[~np.isin(tokens, list(tokenizer.control_ids))]
    return collections.Counter(found.tolist())


@pytest.mark.parametrize("packing", ["concat", "whole"])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_an_epoch_has_every_document_once_however_many_processes_read_it(data, tokenizer, packing, processes):
    alone = RunData(tokenizer, data.sets[:1], (1.0,), "")
    windows = windows_of(alone, packing=packing)
    count = windows.sets[0].count
    batches = -(-count // 8)
    streams = [
        taken(windows_of(alone, packing=packing), batches, process=index, processes=processes)
        for index in range(processes)
    ]
    rows = [
        {name: batch[name][row] for name in DTYPES}
        for step in zip(*streams, strict=True)
        for batch in step
        for row in range(8 // processes)
    ]
    lengths = data.sets[0].train.lengths.tolist()
    expected = collections.Counter({1000 + number: length for number, length in enumerate(lengths)})
    found = documents_in(windows, rows[:count], tokenizer)
    # An epoch's very first token is an input only; the BOS it is was not counted.
    assert found == expected


@pytest.fixture(scope="module")
def snippets() -> list[str]:
    """20,000 different texts: blocks of four lines of the standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    lines = [
        line
        for path in sorted(root.glob("*.py"))
        for line in path.read_text("utf-8").splitlines(keepends=True)
    ]
    blocks = dict.fromkeys("".join(lines[first : first + 4]) for first in range(0, len(lines), 4))
    return list(itertools.islice((block for block in blocks if block.strip()), 20_000))


@pytest.mark.parametrize("packing", ["concat", "whole"])
def test_a_tenth_of_20_000_documents_is_moved_and_each_inverts_to_its_text(tmp_path, snippets, packing):
    assert len(snippets) == 20_000
    trained = train_tokenizer(snippets[:2000], 1000)
    writer = ShardWriter(tmp_path, "train")
    for tokens in trained.encode_documents(snippets):
        writer.append(tokens)
    writer.close()
    stored = TokenSet(tmp_path, ["train"])
    data = RunData(trained, (PreparedSet(tmp_path, trained, stored, stored, {}),), (1.0,), "")
    # A window that holds all of them: each stands whole in it.
    length = int(stored.lengths.sum()) + 5 * len(snippets)
    windows = windows_of(data, packing=packing, length=length, fim_rate=0.1)
    assert windows.sets[0].count == 1
    window, controls = windows[0], controls_of(trained, 0.1)
    real = window["segment_ids"] > 0
    found, moved = [], 0
    for segment in np.split(np.arange(real.sum()), np.flatnonzero(np.diff(window["segment_ids"][real])) + 1):
        tokens = np.append(window["tokens"][segment], window["targets"][segment[-1]])
        end = int(np.flatnonzero(tokens == controls.eos)[0])  # concat: the next document's start follows
        moved += int(tokens[1] == controls.fim_begin)
        found.append(trained.decode(text_of(tokens[: end + 1], controls)))
    assert abs(moved / len(snippets) - 0.1) < 0.005
    assert collections.Counter(found) == collections.Counter(snippets)


def test_shares_are_those_of_the_weights(data):
    windows = windows_of(data)
    chosen = [windows.place(number)[0] for number in range(2000)]
    for count in (100, 999, 2000):
        assert abs(chosen[:count].count(0) / count - 0.7) < 0.005 + 1 / count


def test_sets_and_seeds_have_orders_of_their_own(tokenizer, data):
    twice = RunData(tokenizer, (data.sets[0], data.sets[0]), (1.0, 1.0), "")
    windows = windows_of(twice)
    first = [windows[number]["tokens"].tolist() for number in range(40)]
    assert len({tuple(tokens) for tokens in first}) > 35
    assert first != [windows_of(twice, seed=1)[number]["tokens"].tolist() for number in range(40)]
    assert first == [windows_of(twice)[number]["tokens"].tolist() for number in range(40)]


def test_a_tokenizer_without_fill_in_tokens_serves_without_moving(tmp_path, data, tokenizer):
    described = json.loads(tokenizer.definition)
    renamed = {name: name.replace("fim", "none") for name in CONTROL_TOKENS if "fim" in name}
    for token in described["added_tokens"]:
        token["content"] = renamed.get(token["content"], token["content"])
    vocabulary = described["model"]["vocab"]
    described["model"]["vocab"] = {renamed.get(name, name): number for name, number in vocabulary.items()}
    without = RunData(Tokenizer(json.dumps(described), source="without.json"), data.sets, data.weights, "")
    with pytest.raises(
        ConfigError, match=r"data\.fim_rate=0\.5: without\.json has no control token .*fim_rate=0$"
    ):
        windows_of(without)
    assert windows_of(without, fim_rate=0.0)[0]["tokens"].shape == (LENGTH,)


def heldout(data: RunData, *, batches: int, length: int = LENGTH, **fields) -> list[Batch]:
    config = DataConfig(**{"isolate_documents": True, **fields})
    return heldout_batches(data, config, batch_size=3, sequence_length=length, batches=batches)


@pytest.mark.parametrize("packing", ["concat", "whole"])
@pytest.mark.parametrize("length", [LENGTH, 100_000])
def test_heldout_text_is_used_to_the_last_token_unmoved_and_padded(data, tokenizer, packing, length):
    batches = heldout(data, batches=10**6 if length == LENGTH else 1, length=length, packing=packing)
    assert all(batch["tokens"].shape == (3, length) for batch in batches)
    targets = np.concatenate([batch["targets"][batch["segment_ids"] > 0] for batch in batches])
    expected = collections.Counter()
    for first, part in zip((1000, 2000), data.sets, strict=True):
        lengths = part.heldout.lengths.tolist()
        expected.update({first + number: own for number, own in enumerate(lengths)})
    expected[tokenizer.eos_id] = 40
    found = collections.Counter(targets.tolist())
    found.pop(tokenizer.bos_id, 0)
    assert found == expected
    padding = {"tokens": tokenizer.pad_id, "targets": tokenizer.pad_id}
    padding |= {"segment_ids": 0, "positions": 0, "loss_mask": 0}
    for batch in batches:
        for name, value in padding.items():
            assert (batch[name][batch["segment_ids"] == 0] == value).all()


def test_heldout_batches_are_always_the_same_and_of_every_set(data):
    one, two = heldout(data, batches=2), heldout(data, batches=2)
    for first, second in zip(one, two, strict=True):
        assert_same(first, second)
    assert len(one) == 2
    tokens = np.concatenate([batch["tokens"].ravel() for batch in one])
    assert (tokens >= 2000).any()
    assert ((tokens >= 1000) & (tokens < 2000)).any()


def test_the_room_does_not_import_jax():
    for path in Path(dsjax.data.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in modules if name.split(".")[0] in ("jax", "flax")], path.name

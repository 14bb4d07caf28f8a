"""Windows, training batches and their resumption, held-out batches."""

import ast
import itertools
import json
import random
from pathlib import Path

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dsjax.data
from dsjax.config import ConfigError
from dsjax.data.loader import Windows, heldout_batches, train_batches
from dsjax.data.preparation import PreparedData
from dsjax.data.store import TokenStore
from dsjax.data.tokenizer import Tokenizer, train_tokenizer
from dsjax.data.windows import Batch

DTYPES = {
    "tokens": np.int32,
    "targets": np.int32,
    "segment_ids": np.int32,
    "positions": np.int32,
    "loss_mask": np.float32,
}


def store_of(lengths: list[int]) -> TokenStore:
    """Documents of these lengths in tokens, where every token of the stream is another number."""
    starts = np.cumsum([0, *lengths[:-1]])
    return TokenStore(np.arange(100, 100 + sum(lengths), dtype=np.uint32), starts.astype(np.int64))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([""], 266)


@pytest.fixture(scope="module")
def prepared(tokenizer) -> PreparedData:
    """21 whole training windows of 8 tokens, 7 and a half held-out ones; 4 documents to a window and less."""
    lengths = [3, 2, 4, 2, 9, 30, 3, 2, 2, 2, 40, 25, 48]
    return PreparedData(tokenizer, store_of(lengths), store_of([20, 3, 2, 36, 4]), {})


def expected_window(store: TokenStore, index: int, length: int, isolate: bool) -> dict[str, list]:
    """The definition, token by token."""
    stream = store.tokens.tolist()
    first = index * length
    stop = min(first + length, len(stream) - 1)
    owner = [sum(start <= i for start in store.document_starts) for i in range(len(stream))]
    window: dict[str, list] = {name: [] for name in DTYPES}
    for i in range(first, stop):
        window["tokens"].append(stream[i])
        window["targets"].append(stream[i + 1])
        begin = first
        if isolate:
            begin = max(first, int(store.document_starts[owner[i] - 1]))
        window["segment_ids"].append(1 + owner[i] - owner[first] if isolate else 1)
        window["positions"].append(i - begin)
        window["loss_mask"].append(float(not isolate or owner[i] == owner[i + 1]))
    return window


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(2, 12), min_size=1, max_size=12), st.integers(1, 20), st.booleans())
def test_windows_follow_the_definition(lengths, sequence_length, isolate):
    store = store_of(lengths)
    windows = Windows(store, sequence_length, isolate)
    assert len(windows) == (sum(lengths) - 1) // sequence_length
    for index in range(-(-(sum(lengths) - 1) // sequence_length)):
        window = windows[index]
        assert {name: values.dtype for name, values in window.items()} == DTYPES
        expected = expected_window(store, index, sequence_length, isolate)
        assert {name: values.tolist() for name, values in window.items()} == expected


def training(prepared: PreparedData, *, batch_size=4, seed=0, isolate=True) -> grain.DatasetIterator[Batch]:
    return train_batches(
        prepared, batch_size=batch_size, sequence_length=8, isolate_documents=isolate, seed=seed
    )


def assert_same(one: Batch, two: Batch) -> None:
    assert one.keys() == two.keys() == DTYPES.keys()
    for name in DTYPES:
        np.testing.assert_array_equal(one[name], two[name])


def first_tokens(iterator: grain.DatasetIterator[Batch], count: int) -> list[int]:
    return [int(row) for batch in itertools.islice(iterator, count) for row in batch["tokens"][:, 0]]


def test_batches_of_one_sequence_are_every_window_once_an_epoch(prepared):
    count = (len(prepared.train.tokens) - 1) // 8
    seen = first_tokens(training(prepared, batch_size=1), count)
    assert sorted(seen) == sorted(first_tokens(training(prepared, batch_size=count), 1))


@pytest.mark.parametrize("isolate", [False, True])
def test_batches_are_stacked_windows(prepared, isolate):
    windows = Windows(prepared.train, 8, isolate)
    by_first_token = {int(windows[i]["tokens"][0]): windows[i] for i in range(len(windows))}
    assert len(windows) == 21
    for batch in itertools.islice(training(prepared, isolate=isolate), 12):
        assert {name: (values.shape, values.dtype) for name, values in batch.items()} == {
            name: ((4, 8), dtype) for name, dtype in DTYPES.items()
        }
        for row in range(4):
            window = by_first_token[int(batch["tokens"][row, 0])]
            assert_same({name: values[row] for name, values in batch.items()}, window)


def test_every_epoch_has_every_window_once_in_another_order(prepared):
    # 21 windows in batches of 4: batches cross the border between epochs.
    seen = first_tokens(training(prepared), 63 // 4 + 1)[:63]
    epochs = [seen[0:21], seen[21:42], seen[42:63]]
    assert all(sorted(epoch) == list(range(100, 100 + 21 * 8, 8)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert sorted(epochs[0]) != epochs[0]


def test_seeds_decide_the_order_and_neighbouring_seeds_share_none(prepared):
    assert first_tokens(training(prepared, seed=3), 10) == first_tokens(training(prepared, seed=3), 10)
    second_epoch = first_tokens(training(prepared, batch_size=21, seed=0), 2)[21:]
    assert first_tokens(training(prepared, batch_size=21, seed=1), 1) != second_epoch


@pytest.mark.parametrize("step", [0, *random.Random(5).sample(range(1, 30), 3), 5])
def test_a_fresh_iterator_continues_exactly(prepared, step):
    """Step 5 is inside the batch that holds the end of the first epoch and the start of the second."""
    whole = list(itertools.islice(training(prepared), 45))
    stopped = training(prepared)
    for batch in whole[:step]:
        assert_same(next(stopped), batch)
    state = json.loads(json.dumps(stopped.get_state()))
    next(stopped)  # what was prefetched or read after saving plays no part
    resumed = training(prepared)
    next(resumed)
    resumed.set_state(state)
    for batch in whole[step:]:
        assert_same(next(resumed), batch)


def test_too_little_text_for_a_batch_is_an_error_with_the_numbers(prepared):
    with pytest.raises(ConfigError, match=r"train\.batch_size=22 .* need 177 training tokens .* has 172"):
        training(prepared, batch_size=22)
    with pytest.raises(ConfigError, match=r"sequence_length=400 .* need 401 training tokens .* has 172"):
        train_batches(prepared, batch_size=1, sequence_length=400, isolate_documents=False, seed=0)
    assert len(next(training(prepared, batch_size=21))["tokens"]) == 21


def heldout(prepared: PreparedData, *, batches: int, batch_size: int = 3, length: int = 8) -> list[Batch]:
    return heldout_batches(
        prepared, batch_size=batch_size, sequence_length=length, isolate_documents=True, batches=batches
    )


def test_heldout_text_is_used_to_the_last_token_and_padded(prepared):
    batches = heldout(prepared, batches=50)
    assert len(batches) == 3  # 8 windows in batches of 3
    assert all(batch["tokens"].shape == (3, 8) for batch in batches)
    assert {name: values.dtype for name, values in batches[-1].items()} == DTYPES
    real = np.concatenate([batch["segment_ids"] > 0 for batch in batches])
    targets = np.concatenate([batch["targets"] for batch in batches])
    assert targets[real].tolist() == list(range(101, 165))
    padding = {"tokens": 2, "targets": 2, "segment_ids": 0, "positions": 0, "loss_mask": 0}
    for name, value in padding.items():
        assert (np.concatenate([batch[name] for batch in batches])[~real] == value).all()


def test_heldout_batches_are_always_the_same_and_spread_over_the_text(prepared):
    one, two = heldout(prepared, batches=1), heldout(prepared, batches=1)
    assert len(one) == 1
    assert_same(one[0], two[0])
    assert one[0]["tokens"][:, 0].tolist() == [100, 100 + 2 * 8, 100 + 5 * 8]


@pytest.mark.parametrize("tokens", [2, 3, 8, 9, 10])
def test_a_few_heldout_tokens_make_one_batch(tokenizer, tokens):
    few = PreparedData(tokenizer, store_of([50]), store_of([tokens]), {})
    (batch,) = heldout(few, batches=4, batch_size=2)
    assert batch["loss_mask"].sum() == tokens - 1
    (longer,) = heldout(few, batches=1, batch_size=1, length=64)
    assert longer["loss_mask"].sum() == tokens - 1


def test_the_room_does_not_import_jax():
    for path in Path(dsjax.data.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in modules if name.split(".")[0] in ("jax", "flax")], path.name

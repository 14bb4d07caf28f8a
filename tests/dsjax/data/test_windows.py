"""Windows of documents, cut and packed, against their definition; moved middles; mixtures."""

import collections
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moved_middles import text_of

from dsjax.data.documents import Controls, Cut, rendered
from dsjax.data.mixture import Mixture, ProcessRows
from dsjax.data.windows import ConcatWindows, PackedWindows, Shape

CONTROLS = Controls(bos=0, eos=1, pad=2, fim_begin=3, fim_hole=4, fim_end=5)


@dataclasses.dataclass
class Texts:
    """Documents of these lengths, where every token of every text is another number."""

    lengths: np.ndarray

    def text(self, number: int, start: int, stop: int) -> np.ndarray:
        assert 0 <= start <= stop <= self.lengths[number]
        first = 100 + int(self.lengths[:number].sum())
        return np.arange(first + start, first + stop, dtype=np.int32)


def texts(lengths: list[int]) -> Texts:
    return Texts(np.array(lengths, np.int64))


def whole(documents: Texts, number: int, cut: Cut | None = None) -> list[int]:
    return rendered(documents, number, cut, CONTROLS, 0, 10**9).tolist()


lengths = st.lists(st.integers(0, 30), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 12), st.data())
def test_a_document_is_rendered_part_by_part(length, data):
    documents = texts([7, length])
    text = documents.text(1, 0, length).tolist()
    assert whole(documents, 1) == [0, *text, 1]
    a, b = sorted((data.draw(st.integers(0, length)), data.draw(st.integers(0, length))))
    moved = [0, 3, *text[:a], 4, *text[b:], 5, *text[a:b], 1]
    assert whole(documents, 1, Cut(a, b)) == moved
    start, stop = sorted((data.draw(st.integers(0, length + 5)), data.draw(st.integers(0, length + 5))))
    assert rendered(documents, 1, Cut(a, b), CONTROLS, start, stop).tolist() == moved[start:stop]
    assert text_of(np.array(moved), CONTROLS).tolist() == text
    assert text_of(np.array([0, *text, 1]), CONTROLS).tolist() == text


def documents_of(windows, epoch: int) -> list[list[int]]:
    """Every document that stands whole in the windows of an epoch, targets included."""
    found = []
    for number in range(windows.count):
        window = windows.window(epoch, number)
        for segment in range(1, window["segment_ids"].max() + 1):
            inside = window["segment_ids"] == segment
            tokens, targets = window["tokens"][inside].tolist(), window["targets"][inside].tolist()
            assert tokens[1:] == targets[:-1]
            found.append([*tokens, targets[-1]])
    return found


@settings(max_examples=100, deadline=None)
@given(lengths, st.integers(1, 20), st.booleans(), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 3))
def test_concatenated_windows_are_a_stream_of_all_documents(given_lengths, length, isolate, fim_rate, epoch):
    documents = texts(given_lengths)
    windows = ConcatWindows(documents, Shape(length, isolate, fim_rate, 7), CONTROLS)
    total = sum(given_lengths) + 2 * len(given_lengths) + 3 * round(fim_rate * len(given_lengths))
    assert windows.count == -(-(total - 1) // length)
    assert windows.padding == pytest.approx(1 - (total - 1) / (windows.count * length))
    shuffled = [windows.window(epoch, number)["tokens"].tolist() for number in range(windows.count)]
    windows._reader.shuffled = lambda epoch, number, count: number
    found = [windows.window(epoch, number) for number in range(windows.count)]
    assert sorted(shuffled) == sorted(window["tokens"].tolist() for window in found)
    # The definition: every document once, in the epoch's order, each with its own cut.
    order, _ = windows._order(epoch)
    assert sorted(order) == list(range(len(given_lengths)))
    stream = [t for n in order for t in windows._reader.read(epoch, int(n), 0, 10**9).tolist()]
    assert len(stream) == total
    for number, window in enumerate(found):
        part = stream[number * length : (number + 1) * length + 1]
        real = np.arange(length) < len(part) - 1
        assert window["tokens"][real].tolist() == part[:-1]
        assert window["targets"][real].tolist() == part[1:]
        assert (window["tokens"][~real] == CONTROLS.pad).all()
        assert not window["segment_ids"][~real].any()
        assert not window["loss_mask"][~real].any()
        assert real.all() or number == windows.count - 1
        starts = np.flatnonzero(window["tokens"] == CONTROLS.bos)
        expected = np.ones(length, int)
        positions = np.arange(length)
        for start in starts if isolate else []:
            expected[start:] += start > 0
            positions[start:] = np.arange(length - start)
        assert window["segment_ids"][real].tolist() == expected[real].tolist()
        assert window["positions"][real].tolist() == positions[real].tolist()
        mask = np.where(isolate & (window["targets"] == CONTROLS.bos), 0, 1)
        assert window["loss_mask"][real].tolist() == mask[real].tolist()


@settings(max_examples=100, deadline=None)
@given(lengths, st.integers(1, 40), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 3))
def test_packed_windows_hold_every_document_once(given_lengths, length, fim_rate, epoch):
    documents = texts(given_lengths)
    windows = PackedWindows(documents, Shape(length, True, fim_rate, 7), CONTROLS)
    room = [n + 1 + 3 * (fim_rate > 0) for n in given_lengths]
    assert windows.cut == sum(n > length for n in room)
    found = documents_of(windows, epoch)
    fitting = [piece for piece in found if piece[0] == CONTROLS.bos and piece[-1] == CONTROLS.eos]
    restored = collections.Counter(tuple(text_of(np.array(piece), CONTROLS)) for piece in fitting)
    expected = collections.Counter(
        tuple(documents.text(number, 0, n))
        for number, n in enumerate(given_lengths)
        if room[number] <= length
    )
    assert not expected - restored
    targets = [token for piece in found for token in piece[1:] if token >= 100]
    first = {token for piece in found for token in piece[:1] if token >= 100}
    assert len(targets) == len(set(targets))
    assert set(targets) | first == {
        t for number, n in enumerate(given_lengths) for t in documents.text(number, 0, n)
    }
    for number in range(windows.count):
        window = windows.window(epoch, number)
        padding = window["segment_ids"] == 0
        assert (window["loss_mask"] == ~padding).all()
        assert (window["tokens"][padding] == CONTROLS.pad).all()


def test_packing_wastes_little():
    rng = np.random.default_rng(0)
    documents = texts(np.minimum(rng.lognormal(5, 1.2, 20_000).astype(int), 30_000).tolist())
    windows = PackedWindows(documents, Shape(4096, True, 0.0, 0), CONTROLS)
    assert windows.padding < 0.01
    assert windows.cut == np.count_nonzero(documents.lengths + 1 > 4096)
    places = sum(
        np.count_nonzero(windows.window(0, number)["segment_ids"] == 0) for number in range(windows.count)
    )
    assert places == pytest.approx(windows.padding * 4096 * windows.count)


@pytest.mark.parametrize("kind", [ConcatWindows, PackedWindows])
def test_a_tenth_of_the_documents_of_every_epoch_has_its_middle_moved(kind):
    documents = texts([3] * 20_000)
    windows = kind(documents, Shape(64, True, 0.1, 3), CONTROLS)
    moved = []
    for epoch in (0, 1):
        found = [windows.window(epoch, number) for number in range(windows.count)]
        count = sum(np.count_nonzero(window["tokens"] == CONTROLS.fim_begin) for window in found)
        assert abs(count - 2000) <= 20  # but for the rest that fills no window
        moved.append(windows._reader.moved(epoch))
    assert np.count_nonzero(moved[0] & moved[1]) < 400  # others in the next epoch: 200 would be chance


def test_epochs_differ_and_seeds_differ():
    documents = texts(list(range(200)))
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        windows = ConcatWindows(documents, Shape(16, False, 0.0, seed), CONTROLS)
        orders.append([windows.window(epoch, number)["tokens"].tolist() for number in range(windows.count)])
        assert orders[-1] == [windows.window(epoch, n)["tokens"].tolist() for n in range(windows.count)]
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]
    assert orders[1] != orders[2]


@dataclasses.dataclass
class Counted:
    """Windows that only say which they are."""

    name: str
    count: int

    def window(self, epoch: int, number: int):
        return self.name, epoch, number


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=5), st.integers(1, 30_000))
def test_proportions_are_exact_at_any_time(weights, length):
    mixture = Mixture([Counted(str(i), 7 + i) for i in range(len(weights))], weights)
    counts = np.zeros(len(weights))
    for number in range(length):
        counts[mixture.place(number)[0]] += 1
    share = np.array(weights) / sum(weights)
    assert (np.abs(counts - share * length) <= 2 + 1e-4 * length).all()


def test_every_window_of_a_set_comes_once_an_epoch_and_in_turn():
    mixture = Mixture([Counted("a", 5), Counted("b", 3)], [0.7, 0.3])
    found = [mixture[number] for number in range(25_000)]
    for name, count in (("a", 5), ("b", 3)):
        own = [(epoch, place) for each, epoch, place in found if each == name]
        assert own == [divmod(number, count) for number in range(len(own))]


def test_batches_are_the_same_however_many_processes_read_them():
    mixture = Mixture([Counted("a", 5), Counted("b", 3)], [0.7, 0.3])
    alone = [mixture[number] for number in range(80)]
    for processes in (1, 2, 4):
        each = 8 // processes
        rows = [ProcessRows(mixture, 8, range(first, first + each), 0) for first in range(0, 8, each)]
        batches = [[part[batch * each + row] for part in rows for row in range(each)] for batch in range(10)]
        assert [row for batch in batches for row in batch] == alone

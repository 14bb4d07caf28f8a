"""Which tokens can influence which: not later ones, not padding, not other documents; in both forms."""

import numpy as np
import pytest
from numerics import relative
from small_model import logits_of, random_model, random_tokens, small_config, with_config

from dsjax.data.documents import Controls
from dsjax.data.windows import ConcatWindows, PackedWindows, Shape

LENGTH = 600
FORMS = {"mha": LENGTH, "mqa": 64}  # dense_attention_max_length
V3 = {"index_topk": 0}


@pytest.fixture(scope="module", params=[*FORMS, "v3"])
def model(request):
    changes = V3 if request.param == "v3" else {"dense_attention_max_length": FORMS[request.param]}
    return random_model(small_config(**changes))


@pytest.fixture(scope="module")
def tokens():
    return random_tokens(small_config(), (1, LENGTH))


def changed(tokens: np.ndarray, where) -> np.ndarray:
    result = tokens.copy()
    result[where] = (result[where] + 1) % 512
    return result


def logits(model, tokens, segments=None):
    """Always of the same arguments, so that each model is compiled once."""
    positions = np.arange(tokens.shape[1], dtype=np.int32)[None]
    return np.asarray(
        logits_of(model, tokens, positions, np.ones_like(tokens) if segments is None else segments)
    )


def test_a_token_changes_nothing_before_it(model, tokens):
    """One that sees more keys than it selects, both sides of a block's end, the last but one."""
    before = logits(model, tokens)
    for t in (70, 127, 128, 598):
        after = logits(model, changed(tokens, (0, t)))
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert relative(after[:, t], before[:, t]) > 1e-2
        assert relative(after[:, t + 1], before[:, t + 1]) > 1e-6


def test_documents_do_not_see_each_other(model, tokens):
    """The second document alone, and padding behind it, give the same as behind another document."""
    segments = np.repeat([1, 2, 0], [250, 300, 50])[None].astype(np.int32)
    second = slice(250, 550)
    both = logits(model, tokens, segments)
    other_first = logits(model, changed(tokens, (0, slice(0, 250))), segments)
    other_padding = logits(model, changed(tokens, (0, slice(550, 600))), segments)
    assert relative(other_first[:, :250], both[:, :250]) > 0.1
    assert relative(other_first[:, second], both[:, second]) < 1e-6
    assert relative(other_padding[:, :550], both[:, :550]) < 1e-6
    together = logits(model, tokens)
    other_together = logits(model, changed(tokens, (0, slice(0, 250))))
    assert relative(other_together[:, second], together[:, second]) > 1e-2


class Texts:
    """Documents in memory, as windows read them."""

    def __init__(self, tokens: np.ndarray, lengths: list[int]):
        self.lengths = np.array(lengths)
        self.stored = np.split(tokens, np.cumsum(lengths)[:-1])

    def text(self, number: int, start: int, stop: int) -> np.ndarray:
        return self.stored[number][start:stop]


@pytest.mark.parametrize("kind", [PackedWindows, ConcatWindows])
def test_in_isolated_windows_no_token_attends_to_another_document(model, tokens, kind):
    """Windows as training reads them, with moved middles; each document in turn becomes another text."""
    lengths = [200, 150, 120, 80]
    controls = Controls(bos=0, eos=1, pad=2, fim_begin=3, fim_hole=4, fim_end=5)
    shape = Shape(LENGTH, isolate=True, fim_rate=0.5, seed=0)
    stored = np.maximum(tokens[0, : sum(lengths)], 10)
    window = kind(Texts(stored, lengths), shape, controls).window(0, 0)

    def seen(tokens: np.ndarray) -> np.ndarray:
        batch = (tokens[None], window["positions"][None], window["segment_ids"][None])
        return np.asarray(logits_of(model, *batch))[0]

    before, segments = seen(window["tokens"]), window["segment_ids"]
    assert sorted(set(segments.tolist()) - {0}) == [1, 2, 3, 4]
    assert np.count_nonzero(window["tokens"] == controls.fim_begin) == 2
    for segment in (1, 2, 3, 4):
        own = segments == segment
        after = seen(
            np.where(own & (window["tokens"] > 5), (window["tokens"] + 7) % 500 + 6, window["tokens"])
        )
        others = ~own & (segments > 0)
        assert relative(after[own], before[own]) > 0.1
        assert relative(after[others], before[others]) < 1e-6


def test_a_document_gives_the_same_wherever_it_stands():
    """Packed behind another one, with its positions counted from 0 or not, and alone."""
    seed = 12  # the selection has no near-ties
    model = random_model(small_config(attention_block_size=64), seed)
    tokens = random_tokens(model.config, (1, 350), seed)
    segments = np.repeat([1, 2], [130, 220])[None].astype(np.int32)
    running_on = np.arange(350, dtype=np.int32)[None]
    restarted = np.where(segments == 2, running_on - 130, running_on)
    alone = logits_of(with_config(model, attention_block_size=220), tokens[:, 130:])
    assert relative(logits_of(model, tokens, restarted, segments)[:, 130:], alone) < 1e-5
    # Rotary embedding sees differences of positions alone.
    assert relative(logits_of(model, tokens, running_on, segments)[:, 130:], alone) < 1e-4

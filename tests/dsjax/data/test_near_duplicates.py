"""Near-duplicates planted in the text of the standard library, against exact Jaccard indices."""

import collections
import random
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from dsjax.data.near_duplicates import repeats, signature


def words_in_fives(text: str) -> set[tuple[str, ...]]:
    """By another way than the code's: a character is part of a word, a word of its own, or blank."""
    words: list[str] = []
    joined = False
    for character in text:
        is_word = character.isalnum() or character == "_"
        if is_word and joined:
            words[-1] += character
        elif not character.isspace():
            words.append(character)
        joined = is_word
    fives = collections.deque(maxlen=5)
    found = set()
    for word in words:
        fives.append(word)
        if len(fives) == 5:
            found.add(tuple(fives))
    return found or {tuple(words)}


def jaccard(one: str, other: str) -> float:
    a, b = words_in_fives(one), words_in_fives(other)
    return len(a & b) / len(a | b)


def edited(text: str, share: float, rng: random.Random) -> str:
    """Some words replaced."""
    words = text.split(" ")
    for place in rng.sample(range(len(words)), round(share * len(words))):
        words[place] = f"edit{rng.randrange(10**6)}"
    return " ".join(words)


def reordered(text: str, rng: random.Random) -> str:
    paragraphs = text.split("\n\n")
    rng.shuffle(paragraphs)
    return "\n\n".join(paragraphs)


@pytest.fixture(scope="module")
def originals() -> list[str]:
    """Six hundred passages of real text, no two alike."""
    root, rng = Path(sysconfig.get_path("stdlib")), random.Random(0)
    passages = []
    for path in sorted(root.glob("*.py")):
        text = path.read_text(errors="ignore")
        blocks = text.split("\n\n")
        for first in range(0, len(blocks) - 12, 12):
            passage = "\n\n".join(blocks[first : first + 12])
            if 800 < len(passage) < 6000:
                passages.append(passage)
    rng.shuffle(passages)
    return passages[:600]


def planted(originals: list[str]) -> list[tuple[str, str]]:
    """Pairs of a passage and what was made of it, from hardly changed to hardly alike."""
    rng, pairs = random.Random(1), []
    licence, notice = "\n\n".join(originals[-3:]), "\n\n".join(originals[-6:-3])
    others = iter(originals[470:-6])
    for number, text in enumerate(originals[:470]):
        kind = number % 4
        if kind == 0:
            pairs.append((text, edited(text, rng.uniform(0.01, 0.1), rng)))
        elif kind == 1:
            pairs.append((text, reordered(text, rng)))
        elif kind == 2:
            cut = rng.randrange(len(licence) // 8)
            pairs.append((licence[:cut] + text, notice[:cut] + text))
        else:  # another passage with a part of this one
            pairs.append((text, text[: rng.randrange(len(text) // 2)] + next(others)))
    return pairs


def test_recall_and_false_removals(originals):
    pairs = planted(originals)
    alike = np.array([jaccard(*pair) for pair in pairs])
    found = repeats(signature(text) for pair in pairs for text in pair)
    removed = np.array(found[1::2]) >= 0  # perhaps as what its original repeats itself
    near, far = alike >= 0.8, alike <= 0.5
    assert near.sum() > 120
    assert far.sum() > 100
    assert removed[near].mean() >= 0.98
    texts = [text for pair in pairs for text in pair]
    likeness = np.array([jaccard(texts[n], texts[other]) for n, other in enumerate(found) if other >= 0])
    assert np.count_nonzero(likeness <= 0.5) <= 0.01 * far.sum()
    assert np.mean(likeness >= 0.65) > 0.98


def test_what_is_kept_is_never_what_repeats():
    """A chain, each like the next and the ends not alike: what repeats a kept one goes, and no other."""
    words = [f"w{number}" for number in range(1200)]
    chain = [" ".join(words[start : start + 1000]) for start in (0, 60, 120, 180, 200)]
    assert (
        repeats([signature(text) for text in chain]) == [-1, 0, 0, 0, -1] or jaccard(chain[0], chain[3]) < 0.7
    )
    found = repeats([signature(text) for text in chain])
    assert all(other == -1 or found[other] == -1 for other in found)


def test_short_and_empty_documents():
    texts = ["", "one two", "one two", "one two three", "", "one  two"]
    assert repeats([signature(text) for text in texts]) == [-1, -1, 1, -1, 0, 1]


def test_the_same_text_has_the_same_signature_in_any_process():
    found = signature("a rose is a rose is a rose and a rose is no daisy")
    assert found.dtype == np.uint32
    assert found.shape == (256,)

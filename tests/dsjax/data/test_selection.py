"""Which documents stay, and which of them are held out."""

import dataclasses
import hashlib
import json
import random
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from stage_by_stage import begun, done, write_files

from dsjax.config import ConfigError
from dsjax.data import inputs
from dsjax.data.cleaning import Cleaned
from dsjax.data.plan import Plan
from dsjax.data.selection import HELDOUT, REPEATED, TRAIN, load_sides, select


def side_of_texts(plan: Plan) -> list[tuple[str, int]]:
    """Each text in order with what becomes of it."""
    sides, found = load_sides(plan), []
    for task in range(len(plan.tasks)):
        cleaned = Cleaned(plan, task)
        texts = cleaned.texts(np.arange(len(cleaned.sizes)))
        found += zip(texts, sides.of(task).tolist(), strict=True)
    assert len(found) == len(sides.side) == sides.firsts[-1]
    return found


def account_of(plan: Plan) -> dict:
    return json.loads((plan.work / "sides.json").read_bytes())


def selected(folder: Path, *texts: str, **settings) -> Plan:
    return done(begun(folder / "set", write_files(folder / "text", *texts), **settings), "select")


def is_heldout(text: str, fraction: float) -> bool:
    """By what the first seed does, in whole numbers."""
    whole = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return int.from_bytes(whole[:8], "big") < fraction * 2**64


def heldout_of(plan: Plan) -> set[str]:
    return {text for text, side in side_of_texts(plan) if side == HELDOUT}


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """The numbers below 20,000, each a document."""
    folder = tmp_path_factory.mktemp("many")
    lines = (json.dumps({"text": str(number)}) for number in range(20_000))
    (folder / "numbers.jsonl").write_text("\n".join(lines))
    return done(begun(folder / "set", folder / "numbers.jsonl"), "clean")


def heldout_numbers(plan: Plan, **settings) -> np.ndarray:
    """True for numbers that are held out with other settings."""
    again = dataclasses.replace(plan, settings=dataclasses.replace(plan.settings, **settings))
    select(again, lambda size_bytes: None)
    sides = load_sides(again)
    assert not sides.cut_tails
    return sides.side == HELDOUT


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.4])
def test_what_is_held_out_is_a_matter_of_the_hash(many, fraction):
    found = heldout_numbers(many, heldout_fraction=fraction)
    assert found.tolist() == [is_heldout(str(number), fraction) for number in range(20_000)]


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.4])
def test_the_share_is_the_fraction_and_another_seed_draws_anew(many, fraction):
    first = heldout_numbers(many, heldout_fraction=fraction)
    for seed in range(60):
        found = heldout_numbers(many, heldout_fraction=fraction, seed=seed)
        # Four standard deviations of a binomial share: of all, and of those that the first seed holds out.
        assert abs(found.mean() - fraction) < 4 * (fraction * (1 - fraction) / 20_000) ** 0.5
        if seed:
            deviation = (fraction * (1 - fraction) / first.sum()) ** 0.5
            assert abs(found[first].mean() - fraction) < 4 * deviation
    assert np.array_equal(found, heldout_numbers(many, heldout_fraction=fraction, seed=59))


def test_names_and_other_documents_move_nothing_across(tmp_path):
    texts = [f"document {number}" for number in range(400)]
    plan = selected(tmp_path, *texts, heldout_fraction=0.1)
    before = heldout_of(plan)
    assert 20 < len(before) < 70
    folder = tmp_path / "text"
    for number in range(400):
        (folder / f"{number:03}.txt").rename(folder / f"renamed-{number * 7919 % 400:03}.txt")
    write_files(folder, *(f"other {number}" for number in range(100)))
    after = done(begun(tmp_path / "again", folder, heldout_fraction=0.1), "select")
    assert [text for text, _ in side_of_texts(after)] != texts
    assert heldout_of(after) & set(texts) == before
    assert heldout_of(after) - set(texts)


def test_of_equal_texts_the_first_one_stays(tmp_path, monkeypatch):
    """In another task, too."""
    monkeypatch.setattr(inputs, "_LEAST_TASK_BYTES", 100)
    rng = random.Random(0)
    texts = [f"document {rng.randrange(60)}\n" for _ in range(200)]
    plan = selected(tmp_path, *texts, heldout_fraction=0.3)
    assert len(plan.tasks) > 10
    first: dict[str, int] = {}
    for number, text in enumerate(texts):
        first.setdefault(text, number)
    found = side_of_texts(plan)
    assert [text for text, _ in found] == texts
    stays = [side != REPEATED for _, side in found]
    assert stays == [first[text] == number for number, text in enumerate(texts)]
    assert {side for _, side in found} == {TRAIN, HELDOUT, REPEATED}
    account = account_of(plan)
    assert account["reasons"] == {"exact duplicate": 200 - len(first)}
    size_bytes = sum(len(text) for text in first)
    assert account["counts"] == {"without_exact_duplicates": {"documents": len(first), "bytes": size_bytes}}
    names = [f"{tmp_path}/text/{number:03}.txt" for number in range(200)]
    later = [number for number, text in enumerate(texts) if first[text] != number]
    wanted = [[names[n], "exact duplicate", f"repeats {names[first[texts[n]]]}"] for n in later[:100]]
    assert account["samples"] == wanted


def test_texts_that_differ_in_their_line_ends_only_are_equal(tmp_path):
    plan = selected(tmp_path, "café\nnoir\n", "cafe\u0301\r\nnoir\r", "other words", heldout_fraction=0.4)
    assert account_of(plan)["reasons"] == {"exact duplicate": 1}


def test_near_duplicates_are_counted_and_named_with_what_they_repeat(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "_LEAST_TASK_BYTES", 10_000)
    root = Path(sysconfig.get_path("stdlib"))
    names = ("argparse", "calendar", "difflib", "heapq", "shlex", "textwrap")
    originals = [(root / f"{name}.py").read_text(encoding="utf-8") for name in names]
    edited = [text.replace("self", "this", 2) + "\n# The end.\n" for text in originals[:3]]
    texts = [originals[0], originals[0], *originals[1:], *edited, originals[4]]
    plan = selected(tmp_path, *texts, keep_near_duplicates=False, heldout_fraction=0.4)
    assert len(plan.tasks) > 3
    stays = [side != REPEATED for _, side in side_of_texts(plan)]
    assert stays == [True, False] + [True] * 5 + [False] * 4
    account = account_of(plan)
    assert account["reasons"] == {"exact duplicate": 2, "near-duplicate": 3}
    repeated = [(1, "exact duplicate", 0), (10, "exact duplicate", 5)]
    repeated += [(7, "near-duplicate", 0), (8, "near-duplicate", 2), (9, "near-duplicate", 3)]
    file = str(tmp_path / "text" / "{:03}.txt")
    wanted = [
        [file.format(number), reason, f"repeats {file.format(first)}"] for number, reason, first in repeated
    ]
    assert account["samples"] == wanted
    sizes = np.array([len(text.encode()) for text in texts])
    exact, near = int(sizes[[1, 10]].sum()), int(sizes[[7, 8, 9]].sum())
    assert account["counts"] == {
        "without_exact_duplicates": {"documents": 9, "bytes": int(sizes.sum()) - exact},
        "without_near_duplicates": {"documents": 6, "bytes": int(sizes.sum()) - exact - near},
    }


def test_near_duplicates_stay_where_they_may(tmp_path):
    text = Path(random.__file__).read_text(encoding="utf-8")
    plan = selected(tmp_path, text, text + "# The end.\n", heldout_fraction=0.4)
    assert all(side != REPEATED for _, side in side_of_texts(plan))
    assert account_of(plan)["reasons"] == {"exact duplicate": 0}


@pytest.mark.parametrize("size_bytes", [10, 100_000])
@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("fraction", [0.02, 0.49])
def test_a_single_document_gives_its_tail(tmp_path, size_bytes, copies, fraction):
    """Whichever side the hash would put it on."""
    for letter in "abcdef":
        plan = selected(tmp_path / letter, *[letter * size_bytes] * copies, heldout_fraction=fraction)
        assert load_sides(plan).cut_tails
        assert [side for _, side in side_of_texts(plan)] == [TRAIN] + [REPEATED] * (copies - 1)


def test_of_a_few_documents_one_of_a_fitting_size_is_held_out_whole(tmp_path):
    """Too few for the hash to choose any, one of them half of the text, some next to nothing."""
    texts = ["x" * 50_000, *(letter * 6_000 for letter in "abcdefgh"), "tiny", "so is this"]
    assert not any(is_heldout(text, 0.001) for text in texts)
    plan = selected(tmp_path, *texts, heldout_fraction=0.001)
    assert not load_sides(plan).cut_tails
    (heldout,) = [text for text, side in side_of_texts(plan) if side == HELDOUT]
    assert len(heldout) == 6_000


def test_a_few_documents_of_one_side_give_their_tails(tmp_path):
    texts = [f"document {number}" for number in range(100)]
    heldout = [text for text in texts if is_heldout(text, 0.3)][:3]
    training = [text for text in texts if not is_heldout(text, 0.3)][:3]
    for name, own in {"heldout": heldout, "training": training}.items():
        plan = selected(tmp_path / name, *own, heldout_fraction=0.3)
        assert load_sides(plan).cut_tails
        assert side_of_texts(plan) == [(text, TRAIN) for text in own]
    plan = selected(tmp_path / "both", *training, *heldout, heldout_fraction=0.3)
    assert not load_sides(plan).cut_tails
    assert [side for _, side in side_of_texts(plan)] == [TRAIN] * 3 + [HELDOUT] * 3


def test_where_nothing_is_left_the_reasons_are_counted(tmp_path):
    folder = write_files(tmp_path / "text", *[" \n"] * 5, *["too short"] * 12)
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "dangling.txt").symlink_to(folder / "gone")
    plan = begun(tmp_path / "set", folder, quality="prose")
    with pytest.raises(ConfigError, match=r"/text") as error:
        done(plan, "select")
    for told in ("5 empty", "12 gopher_short_doc", "1 not UTF-8", "1 unreadable"):
        assert told in str(error.value)


def test_text_that_is_too_short_to_be_cut_says_so(tmp_path):
    with pytest.raises(ConfigError, match="too short"):
        selected(tmp_path, "x")

"""Training, loading, and the promise that text stays text."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsjax.config import ConfigError
from dsjax.data.tokenizer import BOS, CONTROL_TOKENS, EOS, PAD, Tokenizer, load_tokenizer, train_tokenizer

SOURCE_TEXT = Path(argparse.__file__).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer([SOURCE_TEXT], 1000)


@pytest.fixture(scope="module")
def like_deepseek(trained, tmp_path_factory) -> Tokenizer:
    """A file as DeepSeek publishes it: most control tokens marked not special, one apart from the merges."""
    folder = tmp_path_factory.mktemp("tokenizer")
    described = definition_of(trained, folder)
    for token in described["added_tokens"]:
        token["special"] = token["content"] in (BOS, EOS, PAD)
        token["normalized"] = token["special"]
    new = {"id": 1000, "content": "<｜tool▁calls▁begin｜>"}
    described["added_tokens"].append({**described["added_tokens"][-1], **new})
    return load_tokenizer(written(folder, described))


def definition_of(tokenizer: Tokenizer, folder: Path) -> dict:
    tokenizer.save(folder / "tokenizer.json")
    return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))


def written(folder: Path, described: dict) -> Path:
    path = folder / "changed.json"
    path.write_text(json.dumps(described), encoding="utf-8")
    return path


def encoded(tokenizer: Tokenizer, text: str) -> np.ndarray:
    (ids,) = tokenizer.encode_documents([text])
    return ids


def test_control_tokens_have_the_spelling_and_the_ids_of_the_checkpoint(trained):
    assert BOS == "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
    assert EOS == "<\uff5cend\u2581of\u2581sentence\uff5c>"
    assert PAD == "<\uff5c\u2581pad\u2581\uff5c>"
    assert (trained.bos_id, trained.eos_id, trained.pad_id) == (0, 1, 2)
    assert [trained.id_of(name) for name in CONTROL_TOKENS] == list(range(10))
    assert trained.control_ids == set(range(10))


@settings(max_examples=300, deadline=None)
@given(text=st.text())
@example(text="a\r\n\tb  \n\n  c \x00\ufeff é e\u0301 ﬁ 中文字符 日本 한국어 😀👩‍👩‍👧 12345678 ١٢٣٤")
def test_any_text_round_trips_and_its_bytes_are_counted(trained, text):
    ids = encoded(trained, text)
    assert trained.decode(ids) == text
    assert trained.token_bytes[ids].sum() == len(text.encode())
    assert trained.control_ids.isdisjoint(ids.tolist())


@pytest.mark.parametrize("kind", ["trained", "like_deepseek"])
@pytest.mark.parametrize("name", [*CONTROL_TOKENS, "<｜tool▁calls▁begin｜>"])
def test_a_control_token_spelt_in_text_stays_text(kind, name, request):
    tokenizer = request.getfixturevalue(kind)
    for text in (name, name * 3, f"x{name}y", f" {name}\n", f"{name[:-1]}{name}"):
        ids = encoded(tokenizer, text)
        assert tokenizer.control_ids.isdisjoint(ids.tolist())
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_control_ids_are_decoded_or_left_out(trained):
    ids = [trained.bos_id, *encoded(trained, "hi").tolist(), trained.id_of("<think>"), trained.eos_id]
    assert trained.decode(ids) == "hi"
    assert trained.decode(np.array(ids), skip_control=False) == f"{BOS}hi<think>{EOS}"


def test_a_cut_character_and_unknown_ids_decode_without_error(trained):
    ids = encoded(trained, "😀")
    assert len(ids) > 1
    assert "\ufffd" in trained.decode(ids[:1])
    assert trained.decode([trained.vocab_size, 10**6]) == ""


def test_token_bytes_cover_the_vocabulary(trained):
    assert trained.token_bytes.dtype == np.int32
    assert trained.token_bytes.shape == (trained.vocab_size,) == (1000,)
    assert not trained.token_bytes[:10].any()
    assert (trained.token_bytes[10:266] == 1).all()
    assert (trained.token_bytes[266:] > 1).all()


def test_numbers_and_scripts_are_split(trained):
    tokenizer = train_tokenizer(["1234567 中文abc " * 100], 400)
    pieces = [tokenizer.decode([i]) for i in encoded(tokenizer, "1234567 中文abc").tolist()]
    assert pieces[:3] == ["123", "456", "7"]
    assert pieces[-2:] == ["中文", "abc"]
    # Half of what a byte costs: merges were learnt.
    assert len(encoded(trained, SOURCE_TEXT)) < len(SOURCE_TEXT) / 2


def test_training_twice_gives_the_same(tmp_path):
    first, second = train_tokenizer([SOURCE_TEXT], 600), train_tokenizer([SOURCE_TEXT], 600)
    assert definition_of(first, tmp_path) == definition_of(second, tmp_path)


def test_a_vocabulary_must_hold_the_bytes_and_the_control_tokens():
    with pytest.raises(ConfigError, match=r"model\.vocab_size=265 .* use at least 266"):
        train_tokenizer(["text"], 265)
    tokenizer = train_tokenizer(["text"], 266)
    assert tokenizer.vocab_size == 266
    assert tokenizer.decode(encoded(tokenizer, "hé")) == "hé"


def test_a_short_text_gives_fewer_ids_than_asked():
    assert 266 < train_tokenizer(["a short text"], 4096).vocab_size < 300


def test_a_saved_tokenizer_is_loaded_the_same(trained, tmp_path):
    trained.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.vocab_size == trained.vocab_size
    assert np.array_equal(encoded(loaded, SOURCE_TEXT), encoded(trained, SOURCE_TEXT))
    assert np.array_equal(loaded.token_bytes, trained.token_bytes)


def test_ids_beyond_the_merges_are_counted(like_deepseek):
    assert like_deepseek.vocab_size == 1001
    assert like_deepseek.id_of("<｜tool▁calls▁begin｜>") == 1000
    assert like_deepseek.token_bytes.shape == (1001,)
    like_deepseek.check_fits(1001)
    with pytest.raises(
        ConfigError, match=r"model\.vocab_size=1000 .*1001 ids of data\.tokenizer=.*at least 1001"
    ):
        like_deepseek.check_fits(1000)


def test_an_id_that_the_library_would_change_is_an_error(like_deepseek, tmp_path):
    described = definition_of(like_deepseek, tmp_path)
    described["added_tokens"][-1]["id"] = 1003
    with pytest.raises(ConfigError, match=r"data\.tokenizer=.*has id 1003 and would be read as 1000"):
        load_tokenizer(written(tmp_path, described))


def test_a_tokenizer_that_adds_and_cuts_by_itself_is_kept_from_it(trained, tmp_path):
    trained.save(tmp_path / "tokenizer.json")
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, 0)]
    )
    inner.enable_truncation(3)
    inner.enable_padding(length=50)
    inner.save(str(tmp_path / "busy.json"))
    ids = encoded(load_tokenizer(tmp_path / "busy.json"), SOURCE_TEXT[:500])
    assert np.array_equal(ids, encoded(trained, SOURCE_TEXT[:500]))


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"{}", b"\xff", b'{"added_tokens": []}'])
def test_a_missing_or_broken_file_is_an_error_that_names_the_field(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"data\.tokenizer='.*tokenizer\.json'"):
        load_tokenizer(path)


def test_a_tokenizer_without_deepseeks_tokens_is_an_error(trained, tmp_path):
    described = definition_of(trained, tmp_path)
    described["added_tokens"] = [token for token in described["added_tokens"] if token["content"] != PAD]
    with pytest.raises(ConfigError, match=rf"data\.tokenizer=.* no control token {PAD}"):
        load_tokenizer(written(tmp_path, described))


@pytest.mark.parametrize(
    "change", ["normalizer", "prefix space", "not every byte", "a merge is a control token"]
)
def test_a_tokenizer_that_changes_text_is_an_error(trained, tmp_path, change):
    described = definition_of(trained, tmp_path)
    if change == "normalizer":
        described["normalizer"] = {"type": "NFKC"}
    elif change == "prefix space":
        described["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True
    elif change == "not every byte":
        described["model"]["vocab"]["unreachable"] = described["model"]["vocab"].pop("\u0142")
    else:
        described["added_tokens"][3] |= {"content": "in", "id": described["model"]["vocab"]["in"]}
    with pytest.raises(ConfigError, match=r"data\.tokenizer=.* changes text"):
        load_tokenizer(written(tmp_path, described))

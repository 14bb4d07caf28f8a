"""Documents written to shards and read back at random."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dsjax.data import shards, token_set
from dsjax.data.shards import ShardWriter
from dsjax.data.token_set import TokenSet


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Three shards, one of them of empty documents only; records of 100 tokens."""
    for module in (shards, token_set):
        monkeypatch.setattr(module, "RECORD_TOKENS", 100)
    rng = np.random.default_rng(0)
    sizes = [[0, 5, 100, 101, 777], [0, 0], [250, 1]]
    documents = [[rng.integers(0, 2**31, n).astype(np.int32) for n in lengths] for lengths in sizes]
    for number, own in enumerate(documents):
        writer = ShardWriter(tmp_path, f"train-{number}")
        for tokens in own:
            writer.append(tokens)
        writer.close()
    return tmp_path, [tokens for own in documents for tokens in own]


NAMES = ["train-0", "train-1", "train-2"]


def test_any_part_of_any_document_comes_back(written):
    folder, documents = written
    found = TokenSet(folder, NAMES)
    assert found.lengths.tolist() == [len(tokens) for tokens in documents]
    parts = []
    for number, tokens in enumerate(documents):
        edges = sorted({0, 1, 99, 100, 101, 200, 250, len(tokens)} & set(range(len(tokens) + 1)))
        parts += [(number, start, stop) for start in edges for stop in edges if start <= stop]
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda part: found.text(*part), parts))
    for (number, start, stop), tokens in zip(parts, read, strict=True):
        assert tokens.dtype == np.int32
        assert tokens.tolist() == documents[number][start:stop].tolist()


def test_the_same_documents_are_the_same_bytes(written, tmp_path_factory):
    folder, documents = written
    again = tmp_path_factory.mktemp("again")
    writer = ShardWriter(again, "train-0")
    for tokens in documents[:5]:
        writer.append(tokens)
    assert not (again / "train-0.array_record").exists()  # not before it is whole
    writer.close()
    for name in ("train-0.array_record", "train-0.lengths.npy"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    assert sorted(path.name for path in again.iterdir()) == ["train-0.array_record", "train-0.lengths.npy"]


def test_a_shard_of_other_documents_is_refused(written):
    folder, _ = written
    np.save(folder / "train-0.lengths.npy", np.array([500], np.uint32))
    with pytest.raises(ValueError, match="16 records instead of 9"):
        TokenSet(folder, NAMES)

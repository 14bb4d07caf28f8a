"""Headers that the safetensors library wrote, and headers that nobody should have written."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from dsjax.checkpoint.errors import CheckpointError
from dsjax.checkpoint.safetensors_files import INDEX, read_directory, read_header


def write(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(start: int, stop: int, *, shape: list | None = None, dtype: str = "U8") -> dict:
    return {
        "dtype": dtype,
        "shape": [stop - start] if shape is None else shape,
        "data_offsets": [start, stop],
    }


def write_index(directory: Path, weight_map: dict) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_reads_what_the_library_wrote(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(4, dtype=np.int8)}
    save_file(arrays, tmp_path / "model.safetensors", metadata={"format": "np"})
    tensors = read_directory(tmp_path)
    assert tensors.keys() == arrays.keys()
    for name, tensor in tensors.items():
        data = tensor.file.read_bytes()[tensor.start : tensor.start + tensor.size]
        np.testing.assert_array_equal(
            np.frombuffer(data, arrays[name].dtype).reshape(tensor.shape), arrays[name]
        )
    assert tensors["a"].dtype == "F32"


def test_shards_are_joined_by_the_index(tmp_path):
    write(tmp_path / "1.safetensors", {"x": entry(0, 2)}, b"12")
    write(tmp_path / "2.safetensors", {"y": entry(0, 1)}, b"3")
    write_index(tmp_path, {"x": "1.safetensors", "y": "2.safetensors"})
    assert {name: tensor.file.name for name, tensor in read_directory(tmp_path).items()} == {
        "x": "1.safetensors",
        "y": "2.safetensors",
    }


def test_a_dtype_of_other_weights_is_no_damage(tmp_path):
    path = write(tmp_path / "model.safetensors", {"x": entry(0, 3, dtype="F4")}, b"123")
    with pytest.raises(CheckpointError, match="tensor x is 'F4', which cannot be read here"):
        read_header(path)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"x": entry(0, 2), "y": entry(1, 3)}, b"123", "tensor y overlaps another"),
        ({"x": entry(0, 1), "y": entry(2, 3)}, b"123", "tensor y leaves a gap"),
        ({"x": entry(0, 2)}, b"123", "1 bytes at its end belong to no tensor"),
        ({"x": entry(0, 5)}, b"123", "tensor x ends at byte 5 of 3"),
        ({"x": entry(0, 3, shape=[2])}, b"123", "tensor x has 3 bytes, not those of its shape"),
        ({"x": {"dtype": "U8", "shape": [-1], "data_offsets": [0, 0]}}, b"", "tensor x has no shape"),
        ({"x": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}}, b"1", "tensor x has no shape"),
        ({"x": {"dtype": "U8", "shape": [0]}}, b"", "tensor x has no data_offsets"),
        ({"x": []}, b"", "tensor x has no dtype"),
        (b"[]", b"", "not an object"),
        (b'{"x": {}, "x": {}}', b"", "a name stands in it twice"),
        (b"[" * 100_000, b"", "cannot be read"),
        (b"\xff", b"", "cannot be read"),
    ],
)
def test_a_damaged_header_is_one_sentence(tmp_path, header, data, message):
    path = write(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as raised:
        read_header(path)
    assert str(raised.value).startswith(f"{path} is damaged: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"1234567", (9).to_bytes(8, "little") + b"{}", b"\xff" * 20])
def test_a_header_longer_than_the_file(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="past the end of the file"):
        read_header(path)


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "..", "", "a/b", "nul\0"])
def test_the_index_may_not_leave_the_directory(tmp_path, file):
    write_index(tmp_path, {"x": file})
    with pytest.raises(CheckpointError, match="must lie in the directory"):
        read_directory(tmp_path)


def test_a_link_out_of_the_directory_is_not_followed(tmp_path):
    (tmp_path / "model").mkdir()
    os.symlink(
        write(tmp_path / "x.safetensors", {"x": entry(0, 1)}, b"1"), tmp_path / "model" / "x.safetensors"
    )
    write_index(tmp_path / "model", {"x": "x.safetensors"})
    with pytest.raises(CheckpointError, match="is a link to"):
        read_directory(tmp_path / "model")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"x": "1.safetensors", "y": "2.safetensors"}, "2.safetensors is missing"),
        (
            {"x": "1.safetensors", "y": "1.safetensors"},
            "tensor y is in model.safetensors.index.json but not in 1",
        ),
        ({"y": "1.safetensors", "z": "1.safetensors"}, "tensor x is in 1.safetensors but not in model"),
        ({"x": 1}, "no weight_map"),
        ([], "no weight_map"),
    ],
)
def test_an_index_at_odds_with_the_files(tmp_path, weight_map, message):
    write(tmp_path / "1.safetensors", {"x": entry(0, 1)}, b"1")
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=message):
        read_directory(tmp_path)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
_ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "U8"]) | _JSON,
        "shape": st.lists(st.integers(-1, 2**70), max_size=4) | _JSON,
        "data_offsets": st.lists(st.integers(-1, 2**70), min_size=1, max_size=3) | _JSON,
    },
)


@settings(max_examples=500, deadline=None)
@given(
    header=st.binary(max_size=200)
    | st.dictionaries(st.text(max_size=8), _ENTRIES | _JSON, max_size=4)
    | _JSON,
    data=st.binary(max_size=50),
    length=st.none() | st.integers(0, 2**64 - 1),
)
def test_no_header_crashes_the_reader(tmp_path_factory, header, data, length):
    path = write(tmp_path_factory.getbasetemp() / "fuzzed.safetensors", header, data)
    if length is not None:
        path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    try:
        tensors = read_header(path)
    except CheckpointError:
        return
    assert all(tensor.start + tensor.size <= path.stat().st_size for tensor in tensors.values())


def test_the_cache_of_huggingface_hub_is_a_directory_of_links(tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    write(blobs / "abc", {"x": entry(0, 2)}, b"12")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    assert read_directory(snapshot).keys() == {"x"}
    (snapshot / "model.safetensors").unlink()
    (tmp_path / "elsewhere").mkdir()
    (blobs / "abc").rename(tmp_path / "elsewhere" / "abc")
    (snapshot / "model.safetensors").symlink_to("../../../elsewhere/abc")
    with pytest.raises(CheckpointError, match="is a link to"):
        read_directory(snapshot)


def test_sizes_that_no_file_has_cost_nothing(tmp_path):
    text = '{"x": {"dtype": "U8", "shape": [' + ",".join(["9" * 4000] * 2000) + '], "data_offsets": [0, 0]}}'
    with pytest.raises(CheckpointError, match="tensor x has no shape"):
        read_header(write(tmp_path / "model.safetensors", text.encode()))


@pytest.mark.parametrize("file", ["\ud800", "x" * 300, "loop.safetensors"])
def test_a_name_that_no_file_can_have(tmp_path, file):
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    write_index(tmp_path, {"x": file})
    with pytest.raises(CheckpointError, match=r"names the file|is missing"):
        read_directory(tmp_path)

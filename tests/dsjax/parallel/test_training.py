"""A run on a mesh of eight devices is that of one device."""

import pytest
from on_devices import on_eight_devices

MESHES = [
    "data=8",
    "fsdp=8",
    "expert=8",
    "context=8",
    "tensor=8",
    "fsdp=2,expert=2,tensor=2",
    "data=2,expert=4",
    "fsdp=2,context=2,expert=2",
    "context=2,tensor=2,expert=2,dense",
]


@pytest.fixture(scope="module")
def found() -> dict[str, dict]:
    """Of twenty steps with unequal padding, by mesh."""
    return on_eight_devices("train_on_mesh.py", "20", *MESHES)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_twenty_steps_are_those_of_one_device(found, mesh):
    """Selected sets are compared by query, of every layer."""
    seen = found[mesh]
    assert seen["losses"] < 1e-5, seen
    assert seen["parameters"] < 1e-5, seen
    assert seen["biases_equal"], seen
    assert seen["biases_moved"], seen
    assert seen["selections_equal"], seen
    assert seen["queries"] > 300 or "dense" in mesh, seen
    if "data" not in mesh:
        assert seen["largest_share"] <= 0.5, seen

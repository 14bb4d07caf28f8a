"""The chosen experts wherever they lie are those of one device."""

import math

import pytest
from on_devices import on_eight_devices


@pytest.fixture(scope="module")
def found() -> dict[str, dict]:
    """By load, mesh, exchange and capacity: how far output and gradients are from those of one device."""
    return on_eight_devices("experts_on_mesh.py")


@pytest.mark.slow
def test_outputs_and_gradients_are_those_of_one_device(found):
    """Of x, weights and all matrices; with several rounds; where four experts have nearly all tokens, and four none."""
    assert len(found) == 32
    for case, values in found.items():
        assert len(values["differ"]) == 6
        for differs in values["differ"]:
            assert differs < 1e-6, case


@pytest.mark.slow
def test_no_device_has_all_experts(found):
    assert all(math.isclose(values["share"], 1 / 8) for values in found.values())

"""The same tests for every implementation of an operation."""

import pytest

from pallas_kernels.platform import choose, interpreted

RACES, TWO_CORES = "tpu, races looked for", "tpu, two cores"


def own_kernels() -> str:
    """The name of the kernels that are made for this machine, or "reference"."""
    return choose("tests", None, {name: lambda name=name: name for name in ("reference", "tpu", "gpu")})()


@pytest.fixture
def implementation(request, capfd):
    """Name of the implementation under test: ``@pytest.mark.parametrize`` it.

    Its kernels run interpreted, except on a machine that they are made for: there they run as they are.

    "tpu, races looked for" is "tpu", and fails where a copy races with a read or a write; "tpu, two cores" is as on a
    v5p.
    """
    if request.param in ("reference", own_kernels()):
        yield request.param
    elif request.param == RACES:
        with interpreted("tpu", detect_races=True):
            yield "tpu"
        # jax 0.10 prints what jax 0.12 raises.
        assert "RACE DETECTED" not in capfd.readouterr().out
    elif request.param == TWO_CORES:
        with interpreted("tpu", cores=2):
            yield "tpu"
    else:
        with interpreted(request.param):
            yield request.param

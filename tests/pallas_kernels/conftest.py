"""The same tests for every implementation of an operation."""

import pytest

from pallas_kernels.platform import interpreted


@pytest.fixture
def implementation(request):
    """Name of the implementation under test, whose kernels run interpreted: ``@pytest.mark.parametrize`` it."""
    if request.param == "reference":
        yield request.param
    else:
        with interpreted(request.param):
            yield request.param

"""What several files of tests begin with."""

from pathlib import Path

import pytest
from replica import SMALL_CONFIG, write_random


@pytest.fixture
def hf(tmp_path) -> Path:
    write_random(tmp_path / "hf", SMALL_CONFIG)
    return tmp_path / "hf"

"""The picture: which panels there are, and that notebooks do not notice."""

import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from dsjax.observe.metrics import MetricsWriter
from dsjax.observe.plots import loss_plot, smooth

_REPOSITORY = Path(__file__).parents[3]
_ALL = ("train/mtp_loss", "eval/bits_per_byte", "moe/load_max_over_mean", "indexer/kl")


def draw(folder: Path, names: tuple[str, ...], steps: int = 40) -> tuple[int, int]:
    """Height and width, in pixels, of the picture of a run with these metrics."""
    with MetricsWriter(folder, tensorboard=False) as writer:
        for step in range(steps):
            loss = float("nan") if step == 7 else 1 + 1 / (step + 1)
            writer.write(step, dict.fromkeys(names, loss))
    loss_plot(folder / "metrics.jsonl", folder / "loss.png")
    picture = matplotlib.image.imread(folder / "loss.png")
    assert picture.min() < 0.6, "something is drawn"
    return picture.shape[:2]


@pytest.mark.parametrize(
    ("names", "rows", "columns"),
    [
        (("train/loss",), 1, 1),
        (("train/loss", "train/mtp_loss"), 1, 1),
        (("train/loss", "eval/bits_per_byte"), 1, 2),
        (("train/loss", *_ALL), 2, 2),
    ],
)
def test_a_panel_for_each_metric_that_is_there(tmp_path, names, rows, columns):
    assert draw(tmp_path, names) == (rows * 525, columns * 840)


def test_a_run_without_or_with_one_line(tmp_path):
    draw(tmp_path / "none", (), steps=0)
    draw(tmp_path / "one", ("train/loss", *_ALL), steps=1)


def test_smoothing():
    np.testing.assert_allclose(smooth(np.array([1.0, 2.0, 6.0, 4.0]), 1), [1, 3, 4, 4])
    np.testing.assert_allclose(smooth(np.array([1.0, np.nan, 3.0, np.inf, 5.0]), 1), [1, 2, 3, 4, 5])
    assert np.isnan(smooth(np.array([np.nan]), 0)).all()
    np.testing.assert_array_equal(smooth(np.array([3.0, 1.0]), 0), [3, 1])


def test_pyplot_and_the_backend_are_left_alone():
    program = (
        "import sys, matplotlib; before = matplotlib.rcParams._get_backend_or_none()\n"
        "import dsjax.observe.plots\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert matplotlib.rcParams._get_backend_or_none() == before"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=_REPOSITORY, timeout=60)

"""Trains a model: ``python train.py --config=configs/tiny.py --workdir=/tmp/run1``."""

from dsjax.config import load
from dsjax.train.loop import run

if __name__ == "__main__":
    load.main(run, about=__doc__)

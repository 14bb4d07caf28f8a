"""Evaluates the newest checkpoint of a run: ``python eval.py --config=configs/tiny.py --workdir=/tmp/run1``."""

from dsjax.config import load
from dsjax.evals.run import run

if __name__ == "__main__":
    load.main(run, about=__doc__)

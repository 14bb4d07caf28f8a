"""How fast text becomes batches: ``python benchmarks/data.py [--rounds 5] [--megabytes 24]``.

The tokenising stage of ``prepare`` in two processes, with reading back, shards and hashes, against ``encode_batch`` of
the tokenizers library on the same text, in turn; the limit is the library. Then what a batch of the tiny
configuration costs, on the core that the step runs on.
"""

import argparse
import contextlib
import itertools
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tokenizers
from alternate import alternate, ratio

from dsjax.config.config_file import load_file
from dsjax.data.engines import Bar, run_processes
from dsjax.data.loader import train_batches, train_windows
from dsjax.data.preparation import prepare_set
from dsjax.data.prepared_set import open_set
from dsjax.data.run_data import only
from dsjax.data.settings import Settings
from dsjax.data.tokenizer import train_tokenizer
from dsjax.observe.transfer import Transfer

_WORKERS = 2
_VOCAB_SIZE = 2048  # that of the tiny configuration
_BATCHES = 500


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--megabytes", type=int, default=24, help="of the standard library, its tests included"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        texts = Path(folder) / "texts"
        texts.mkdir()
        size_bytes = _collect(texts, arguments.megabytes * 10**6)
        _tokenising(Path(folder), size_bytes, arguments.rounds)
        _loading(Path(folder) / "set0")


def _collect(folder: Path, most_bytes: int) -> int:
    """Sources of the standard library as numbered files, so many bytes together; how many those are."""
    root, total = Path(sysconfig.get_path("stdlib")), 0
    for number, path in enumerate(sorted(root.rglob("*.py"))):
        content = path.read_bytes()
        with contextlib.suppress(UnicodeDecodeError):
            content.decode()
            if "site-packages" not in path.parts and content.strip() and total < most_bytes:
                (folder / f"{number:05}.txt").write_bytes(content)
                total += len(content)
    return total


def _tokenising(folder: Path, size_bytes: int, rounds: int) -> None:
    texts = [path.read_text(encoding="utf-8") for path in sorted((folder / "texts").iterdir())]
    given = train_tokenizer(texts[::8], _VOCAB_SIZE)
    given.save(folder / "tokenizer.json")
    bare = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    settings = Settings(
        inputs=(str(folder / "texts"),),
        quality="none",
        keep_near_duplicates=True,
        tokenizer=str(folder / "tokenizer.json"),
    )
    numbers, stage_seconds = itertools.count(), {}

    @contextlib.contextmanager
    def watch(doing: str, total: int) -> Iterator[Bar]:
        start = time.perf_counter()
        yield Transfer(doing, total)
        stage_seconds.setdefault(doing, []).append(time.perf_counter() - start)

    def prepare() -> None:
        prepare_set(
            folder / f"set{next(numbers)}", settings, lambda plan: run_processes(plan, watch, _WORKERS)
        )

    seconds = alternate({"library": lambda: bare.encode_batch(texts), "prepare": prepare}, rounds=rounds)
    ours, limit = np.array(stage_seconds["tokenising"][-rounds:]), seconds["library"]
    print(f"tokenising {size_bytes / 1e6:.1f} MB, medians of {rounds} turns")
    print(f"  encode_batch        {size_bytes / 1e6 / np.median(limit):6.2f} MB/s")
    print(
        f"  the stage           {size_bytes / 1e6 / np.median(ours):6.2f} MB/s  {ratio(limit, ours):.2f} of it"
    )
    print(f"  all of prepare      {size_bytes / 1e6 / np.median(seconds['prepare']):6.2f} MB/s")


def _loading(folder: Path) -> None:
    config = load_file("configs/tiny.py")
    for packing in ("concat", "whole"):
        config.data.packing, config.data.fim_rate = packing, 0.1
        windows = train_windows(only(open_set(folder)), config.data, sequence_length=256, seed=0)
        batches = train_batches(windows, batch_size=config.train.batch_size)
        next(batches)
        start = time.process_time()  # of all threads: what is done ahead takes the step's time, too
        for _ in range(_BATCHES):
            next(batches)
        seconds = (time.process_time() - start) / _BATCHES
        print(f"a batch of the tiny configuration, {packing}: {seconds * 1e3:.2f} ms of processor time")
    print("  (limit: 3 % of its step, which python train.py --config=configs/tiny.py reports)")


if __name__ == "__main__":
    main()

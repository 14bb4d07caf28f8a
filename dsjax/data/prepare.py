"""Text files to a prepared set, for ``train.py --config.data.sets=DIR``: ``python -m dsjax.data.prepare``.

Reads text, JSON lines and parquet, compressed or not; normalises; filters by quality; removes exact and
near-duplicates; holds some documents out; tokenises. An interrupted command goes on where it was when it is given
again.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import get_args

from dsjax.config import ConfigError
from dsjax.data.settings import Names, Quality, Settings

_LARGEST_VOCABULARY = 4_000_000


def main() -> None:
    """Runs the command line; what cannot be used is one sentence and exit status 1."""
    parser = _parser()
    arguments = parser.parse_args()
    if bool(arguments.tokenizer) == arguments.train_tokenizer:
        parser.error("one of --tokenizer=FILE and --train-tokenizer is needed")
    if arguments.train_tokenizer and not arguments.vocab_size:
        parser.error("--train-tokenizer needs --vocab-size")
    if arguments.engine == "slurm" and not arguments.slurm_partition:
        parser.error("--engine=slurm needs --slurm-partition")
    try:
        _prepare(arguments)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write("stopped: run the same command again to go on\n")
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dsjax.data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, defaults = parser.add_argument, Settings()
    add(
        "--input",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATH",
        help="files, folders and quoted globs (default: the standard library of this Python)",
    )
    add("--output", type=Path, required=True, metavar="DIR", help="the prepared set: a new folder")
    add("--tokenizer", default="", metavar="FILE", help="a tokenizer.json, such as a released checkpoint's")
    add("--train-tokenizer", action="store_true", help="train a byte-level BPE on the text instead")
    add("--vocab-size", type=_vocab_size, default=0, metavar="N", help="ids of the tokenizer that is trained")
    add(
        "--workers",
        type=_positive,
        default=os.cpu_count(),
        metavar="N",
        help="processes (default: all cores)",
    )
    add(
        "--quality",
        choices=get_args(Quality),
        default=defaults.quality,
        help="rules that documents must pass; auto: prose for .txt .md .rst .tex, JSON lines and parquet, code for "
        "other endings (default: auto)",
    )
    add("--keep-near-duplicates", action="store_true", help="remove exact duplicates only")
    add(
        "--heldout-fraction",
        type=_fraction,
        default=defaults.heldout_fraction,
        metavar="SHARE",
        help="of the documents, kept for evaluation (default: 0.02)",
    )
    add(
        "--text-field",
        default=defaults.text_field,
        metavar="NAME",
        help="of JSON lines and parquet (default: text)",
    )
    add(
        "--max-document-bytes",
        type=_positive,
        default=defaults.max_document_bytes,
        metavar="N",
        help="longer text files are cut at line ends, longer JSON lines and rows rejected (default: 16 MiB)",
    )
    add(
        "--seed",
        type=_number,
        default=0,
        help="of what is held out and of the tokenizer's sample (default: 0)",
    )
    cluster = parser.add_argument_group("where", "docs/data.md shows both kinds of clusters")
    add = cluster.add_argument
    add(
        "--engine",
        choices=("local", "ray", "slurm"),
        default="local",
        help="who does the work (default: local)",
    )
    add(
        "--ray-address",
        default="auto",
        metavar="ADDRESS",
        help="of a running cluster (default: auto), or local",
    )
    add("--slurm-partition", default="", metavar="NAME", help="where jobs are submitted to")
    add("--slurm-time", default="24:00:00", metavar="LIMIT", help="of a task (default: 24:00:00)")
    add("--slurm-memory-gb", type=_positive, default=4, metavar="N", help="of a task (default: 4)")
    return parser


def _number(text: str) -> int:
    """At most what memory and file formats bear in any of the flags."""
    if not (text.isascii() and text.isdecimal() and int(text) <= 1 << 30):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to {1 << 30}")
    return int(text)


def _positive(text: str) -> int:
    if not _number(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _vocab_size(text: str) -> int:
    if _positive(text) > _LARGEST_VOCABULARY:
        raise argparse.ArgumentTypeError(f"{text!r} is more than {_LARGEST_VOCABULARY}, which no model has")
    return int(text)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 0.5:
        raise argparse.ArgumentTypeError(f"{text!r} must lie between 0 and 0.5: try 0.02")
    return value


def _prepare(arguments: argparse.Namespace) -> None:
    # These take a second or two to import: --help need not wait for them, nor Ctrl-C be a traceback.
    from dsjax.data import clusters, engines
    from dsjax.data.plan import Plan
    from dsjax.data.preparation import prepare_set
    from dsjax.data.report import report
    from dsjax.observe.transfer import Transfer

    def engine(plan: Plan) -> None:
        if arguments.engine == "ray":
            clusters.run_ray(plan, Transfer, arguments.ray_address)
        elif arguments.engine == "slurm":
            options = {"partition": arguments.slurm_partition, "time_limit": arguments.slurm_time}
            options |= {"memory_gb": arguments.slurm_memory_gb, "at_once": arguments.workers}
            jobs = clusters.submit_slurm(plan, **options)
            print(
                f"submitted as Slurm jobs {', '.join(jobs)}: when all are done, {folder}/manifest.json is there"
            )
        else:
            engines.run_processes(plan, Transfer, arguments.workers)

    folder = arguments.output.expanduser().absolute()
    settings = Settings(
        inputs=tuple(arguments.input),
        text_field=arguments.text_field,
        max_document_bytes=arguments.max_document_bytes,
        quality=arguments.quality,
        keep_near_duplicates=arguments.keep_near_duplicates,
        heldout_fraction=arguments.heldout_fraction,
        tokenizer=arguments.tokenizer,
        vocab_size=arguments.vocab_size,
        seed=arguments.seed,
    )
    if prepare_set(folder, settings, engine, names=Names()):
        print(f"{folder} was prepared before: delete it to prepare it again")
    if (folder / "manifest.json").exists():
        report(folder)


if __name__ == "__main__":
    main()

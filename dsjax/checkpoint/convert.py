"""Hugging Face checkpoints in and out: ``python -m dsjax.checkpoint.convert {inspect,import,export}``."""

import argparse
import io
import os
import re
import sys
from pathlib import Path
from typing import get_args

from absl import logging

from dsjax.checkpoint.errors import CheckpointError
from dsjax.checkpoint.weight_dtype import WeightDtype
from dsjax.observe.transfer import QuietlyBrokenConsole


def main() -> None:
    """Runs the command line; what is wrong with a checkpoint is one sentence and exit status 1."""
    arguments = _parser().parse_args()
    logging.set_verbosity(
        logging.FATAL
    )  # orbax warns of what is meant, and its threads log what is raised as well
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of folders may be no text
    try:
        arguments.run(arguments)
    except CheckpointError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(1)
    except OSError as error:  # of the output: those of files are told by name
        sys.stderr.write(f"{error.filename or 'standard output'} cannot be used: {error.strerror}\n")
        if isinstance(sys.stdout, io.TextIOWrapper):  # Python flushes it at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write("stopped: run the same command again to go on\n")
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dsjax.checkpoint.convert", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    inspect = commands.add_parser(
        "inspect", help="check config.json, the index and all headers; reads no weights, exits 1 on a problem"
    )
    inspect.add_argument("directory", type=_folder, metavar="DIR")
    inspect.set_defaults(run=_inspect)
    import_ = commands.add_parser("import", help="safetensors to an orbax checkpoint of this package")
    import_.add_argument(
        "--source", type=_folder, required=True, metavar="DIR", help="config.json, index and shards"
    )
    import_.add_argument("--target", type=_folder, required=True, metavar="DIR", help="a new folder")
    _add_dtype(import_)
    import_.add_argument(
        "--new-indexer",
        action="store_true",
        help="add an untrained lightning indexer to a model without one: the start of DSA training from V3.1",
    )
    import_.set_defaults(run=_import)
    export = commands.add_parser("export", help="a checkpoint of this package to safetensors")
    source_help = "what `convert import` wrote, or the --workdir of train.py: its newest checkpoint"
    export.add_argument("--source", type=_folder, required=True, metavar="DIR", help=source_help)
    export.add_argument("--target", type=_folder, required=True, metavar="DIR", help="a new folder")
    _add_dtype(export)
    export.add_argument(
        "--shard-size",
        type=_size_bytes,
        default="5GB",
        metavar="SIZE",
        help="of a file, at most, if no tensor is larger (default: 5GB)",
    )
    export.set_defaults(run=_export)
    return parser


def _add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=get_args(WeightDtype),
        help="of the matrices; fp8 is e4m3 with a scale for each block of 128 by 128 (default: as they are)",
    )


def _folder(text: str) -> Path:
    return Path(text).expanduser()


def _size_bytes(text: str) -> int:
    """``5GB``, ``500MB``, ``2GiB``, ``1.5g`` or a number of bytes."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(?:([kmgt])(i?)b?|b?)", text.lower())
    size = 0
    if match:
        power = "kmgt".index(match[2]) + 1 if match[2] else 0
        size = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if not size:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write 5GB, 500MB or 2GiB")
    return size


# What the commands need takes a second or two to import: --help need not wait for it, nor Ctrl-C be a traceback.


def _inspect(arguments: argparse.Namespace) -> None:
    from dsjax.checkpoint.hf_checkpoint import open_checkpoint
    from dsjax.checkpoint.inspection import report

    if not report(open_checkpoint(arguments.directory), QuietlyBrokenConsole()):
        sys.exit(1)


def _import(arguments: argparse.Namespace) -> None:
    from dsjax.checkpoint.hf_import import import_checkpoint

    options = {"dtype": arguments.dtype, "new_indexer": arguments.new_indexer}
    import_checkpoint(arguments.source, arguments.target, **options)


def _export(arguments: argparse.Namespace) -> None:
    from dsjax.checkpoint.hf_export import export_checkpoint

    options = {"dtype": arguments.dtype, "shard_bytes": arguments.shard_size}
    export_checkpoint(arguments.source, arguments.target, **options)


if __name__ == "__main__":
    main()

"""The kernels of one layer on the device at hand: are they right, how fast are they, and is that what we aim for?

    python benchmarks/kernels.py                      # a GPU or a TPU chip: the 671B model's sizes; CPU: small ones
    python benchmarks/kernels.py --only sparse_mla,topk --json kernels.json

Runs on CPU, one GPU or one TPU chip, wherever jax and numpy are installed (and absl-py, for the FP8 product on GPUs).
Nothing else is needed of this repository than the folders benchmarks/ and pallas_kernels/.

First it measures what the device can reach: a large product of matrices in bfloat16, one in e4m3 (both in float32 and
bfloat16 on CPU), and a large copy. Then each operation is compared with its plain implementation on a piece of its
input (outputs within 5e-3, gradients within 1e-2, selections equal), and timed on all of it: one block of queries, as
the model calls it, against all keys. A row of the table has

  ms, least   the median and the least of the rounds
  rate        useful TFLOP/s, or GB/s of what has to be read; us a row for selection. What nobody asked for does not
              count: keys that a query does not see, or did not select
  ceiling     the share of what the device was measured to reach
  peak        the share of what its maker says, where that is known
  target      what we aim for on this chip at these sizes, and whether it is reached
  error       the greatest relative error found, of outputs / gradients

Where attention is sparse, selections are of two kinds. Neighbours: the queries of a block share most of their keys, as
those of a text do (benchmarks/kernel_inputs.py says how they are made). Random: they share what chance lets them, the
worst case on TPU. "union" is how many times the keys of one query 32 neighbours select together, "unwanted" the share
of pairs computed in vain where a kernel gathers once for all 32.

At the end the whole sparse layer (scores, selection, attention; no projections) stands beside dense attention at the
same position, and decoding from the selected keys beside decoding from all.

An operation that fails has a row with the reason, and the others follow. The exit status is 1 if one failed or is
wrong. One line an operation goes to the standard error, the table to the standard output.
"""

import argparse
import dataclasses
import datetime
import gc
import json
import subprocess
import sys
import time
import traceback
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from device_speed import Ceilings, Chip, chip_of, measure_ceilings, time_calls
from kernel_inputs import SIZES, Sizes, selection_of
from kernel_operations import AGREEMENTS, Operation, operations
from kernel_rows import Row, combined_rows, timed_row
from kernel_runs import calls_of, errors_of, wrong

from pallas_kernels.platform import target
from pallas_kernels.sparse_mla.union_share import union_share

ROOT = Path(__file__).resolve().parents[1]
NAMES = tuple(dict.fromkeys(operation.name for operation in operations(SIZES["small"])))


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    options = _parser().parse_args(arguments)
    sizes_name = options.sizes or ("small" if jax.default_backend() == "cpu" else "671b")
    sizes, device = SIZES[sizes_name], jax.devices()[0]
    chip, clock = chip_of(device), {"rounds": options.repeats, "seconds": options.seconds}
    _progress("measuring what the device can reach")
    ceilings = measure_ceilings(sizes.side, sizes.copied, **clock)
    header = {
        "device": device.device_kind,
        "platform": jax.default_backend(),
        "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "sizes": {"name": sizes_name, **dataclasses.asdict(sizes)},
        "ceilings": {"flops": ceilings.flops, "copied_bytes_a_second": ceilings.copy},
        "peaks": chip._asdict() if chip else None,
    }
    print(headline(header), flush=True)
    print(Row.header(), flush=True)
    aim = chip.name if chip and sizes_name == "671b" else ""
    chosen = [o for o in operations(sizes) if not options.only or o.name in options.only]
    rows = []
    for number, operation in enumerate(chosen, 1):
        start = time.perf_counter()
        rows.append(row_of(operation, sizes, ceilings, chip, aim, clock))
        print(rows[-1], flush=True)
        write_rows(options.json, header, rows)  # a run that is cut off has told what it knew
        verdict = "failed" if rows[-1].failure else "done"
        _progress(f"{number}/{len(chosen)} {rows[-1].name}: {verdict} in {time.perf_counter() - start:.0f} s")
    rows += (combined := combined_rows(rows, sizes, ceilings, chip, aim))
    for row in combined:
        print(row)
    write_rows(options.json, header, rows)
    return int(any(row.failure for row in rows))


def write_rows(path: Path | None, header: dict, rows: list[Row]) -> None:
    """The table as JSON, where one asked for it."""
    if path:
        path.write_text(json.dumps({**header, "rows": [dataclasses.asdict(row) for row in rows]}, indent=1))


def row_of(
    operation: Operation, sizes: Sizes, ceilings: Ceilings, chip: Chip | None, aim: str, clock: dict
) -> Row:
    """Compares, then times; whatever goes wrong becomes the reason in the row."""
    errors, failure = {}, ""
    try:
        if target() != "cpu":  # where the reference is what runs
            errors = errors_of(operation, sizes.piece(), target())
            failure = wrong(errors)
        times = time_calls(calls_of(operation, sizes), **clock)
        row = timed_row(operation, sizes, times, ceilings, chip, aim)
        row.notes = notes_of(operation, sizes)
    except Exception as error:  # of a kernel, a compiler or a device: all are worth a row
        row = Row(operation.name, operation.case, operation.shape(sizes))
        traceback.print_exc()
        reason = (str(error) or repr(error)).splitlines()[0][:300]
        failure = f"{failure}; {reason}" if failure else reason
    row.errors, row.failure = errors, failure
    gc.collect()  # arrays of this operation, before those of the next
    return row


def notes_of(operation: Operation, sizes: Sizes) -> dict[str, float]:
    """How a selection is shared, of those that are made beforehand."""
    agreement = next((a for a in AGREEMENTS if operation.case.endswith(a)), None)
    if agreement is None:
        return {}
    share = union_share(selection_of(sizes, agreement, None), sizes.queries)
    return {"union": float(share.growth), "unwanted": float(share.unwanted)}


def headline(header: dict) -> str:
    """What the rows were measured on, and what it can reach."""
    ceilings = header["ceilings"]
    flops = ", ".join(f"{name} {value / 1e12:.4g} TFLOP/s" for name, value in ceilings["flops"].items())
    seen = f"measured: {flops}, copy {ceilings['copied_bytes_a_second'] / 1e9:.4g} GB/s"
    peaks = header["peaks"]
    said = "no peak known"
    if peaks:
        said = (
            f"{peaks['name']} peak: bf16 {peaks['bf16'] / 1e12:.4g}, e4m3 {peaks['e4m3'] / 1e12:.4g} TFLOP/s"
        )
    commit = header["commit"] or "no commit known"
    lines = [
        f"{header['device']}, jax {header['jax']}, {header['date']}, {commit}, sizes: {header['sizes']['name']}",
        f"{seen}; {said}",
    ]
    if header["platform"] == "cpu":
        lines.append("On CPU the plain implementation is what runs: there is nothing to compare it with.")
    return "\n".join(lines)


def commit() -> str:
    """Of the repository, with "-dirty" if files differ from it; "" where there is none."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", choices=SIZES, help="small on CPU, else those of the 671B model")
    parser.add_argument("--only", type=_names, metavar="A,B", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of each operation, at least")
    parser.add_argument("--seconds", type=float, default=0.5, help="of rounds, at least")
    parser.add_argument("--json", type=Path, help="a file for the rows, and what they were measured on")
    return parser


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(NAMES):
        raise argparse.ArgumentTypeError(
            f"no operation {', '.join(sorted(unknown))}: there are {', '.join(NAMES)}"
        )
    return names


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

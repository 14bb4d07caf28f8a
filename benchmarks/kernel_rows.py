"""The rows of the table: of an operation that was timed, of one that failed, and of several together."""

import dataclasses

from device_speed import Ceilings, Chip, Times
from kernel_inputs import Sizes
from kernel_operations import BACKWARD, BOTH, Operation

BACKWARD_AND_LOSS = {"h100": 0.15, "v5p": 0.20, "v6e": 0.20}  # of the peak
PREFILL_SPEED_UP, DECODE_SPEED_UP = 3.6, 4.2  # over dense attention at the longest position, on these chips
_US, _TFLOPS, _GBS, _TIMES = "us a row", "TFLOP/s", "GB/s", "times"


@dataclasses.dataclass
class Row:
    """What is printed of an operation, and written as it is; None, {} and "" where there is nothing to say."""

    operation: str
    case: str
    shape: str = ""
    milliseconds: float | None = None
    least_milliseconds: float | None = None
    rounds: int | None = None
    useful_flops: float | None = None
    rate: float | None = None
    unit: str = ""
    of_ceiling: float | None = None
    of_peak: float | None = None
    target: float | None = None  # a share of the peak, or in the unit
    reached: bool | None = None
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    notes: dict[str, float] = dataclasses.field(default_factory=dict)
    failure: str = ""

    @property
    def name(self) -> str:
        """Operation and case."""
        return f"{self.operation} {self.case}"

    @staticmethod
    def header() -> str:
        """The names of the columns."""
        columns = f"{'':52}{'shape':34}{'ms':>9}{'least':>10}{'rate':>10}{'':10}{'ceiling':>7}{'peak':>6}"
        return f"{columns}{'target':>8}{'':6}error"

    def __str__(self) -> str:
        def number(value: float | None, form: str) -> str:
            return "" if value is None else format(value, form)

        times = f"{number(self.milliseconds, '.3f'):>9}{number(self.least_milliseconds, '.3f'):>10}"
        rate = f"{number(self.rate, '.4g'):>10} {self.unit:9}"
        shares = f"{number(self.of_ceiling, '.0%'):>7}{number(self.of_peak, '.0%'):>6}"
        target = number(self.target, ".0%" if self.unit == _TFLOPS else ".1f")
        verdict = {None: "", True: "met", False: "missed"}[self.reached]
        errors = " / ".join(f"{error:.1e}" for error in self.errors.values())
        notes = ", ".join(f"{name} {value:.2f}" for name, value in self.notes.items())
        words = [text for text in (errors, notes, f"FAILED: {self.failure}" if self.failure else "") if text]
        line = f"{self.name:52}{self.shape:34}{times}{rate}{shares}{target:>8} {verdict:6} {'; '.join(words)}"
        return line.rstrip()


def timed_row(
    operation: Operation, sizes: Sizes, times: Times, ceilings: Ceilings, chip: Chip | None, aim: str
) -> Row:
    """``aim`` is the chip whose targets hold, "" for none."""
    row = Row(operation.name, operation.case, operation.shape(sizes))
    row.milliseconds, row.least_milliseconds = 1e3 * times.median, 1e3 * times.least
    row.rounds, work = times.rounds, operation.work(sizes)
    row.target = operation.targets.get(aim)
    if work.flops:
        row.useful_flops = work.flops
        _rate_flops(row, work.flops / times.median, operation.dtype, ceilings, chip)
    else:
        row.of_ceiling = work.bytes / times.median / ceilings.copy
        row.rate, row.unit = work.bytes / times.median / 1e9, _GBS
    if work.rows:
        row.rate, row.unit = 1e6 * times.median / work.rows, _US
        row.reached = None if row.target is None else row.rate <= row.target
    return row


def combined_rows(
    rows: list[Row], sizes: Sizes, ceilings: Ceilings, chip: Chip | None, aim: str
) -> list[Row]:
    """What follows from rows that are there: backward pass and loss as one, and how much sparse attention saves."""
    of = {row.name: row for row in rows if row.milliseconds is not None}
    combined = []
    parts = [f"sparse_mla {BACKWARD}, neighbours", f"sparse_indexer_loss {BOTH}, neighbours"]
    if of.keys() >= set(parts):
        row = Row("sparse_mla", "backward and loss, neighbours", of[parts[0]].shape)
        row.milliseconds = sum(of[part].milliseconds for part in parts)
        row.useful_flops = sum(of[part].useful_flops for part in parts)
        row.target = BACKWARD_AND_LOSS.get(aim)
        _rate_flops(row, 1e3 * row.useful_flops / row.milliseconds, "bf16", ceilings, chip)
        combined.append(row)
    batch = f"decode bf16, B = {sizes.sequences}"
    pairs = [(f"prefill at {n}", f"layer sparse at {n}", f"layer dense at {n}") for n in sizes.layers]
    pairs.append((f"decode at {sizes.decoded}, B = {sizes.sequences}", batch, f"{batch}, all keys"))
    aims = {f"prefill at {max(sizes.layers)}": PREFILL_SPEED_UP, pairs[-1][0]: DECODE_SPEED_UP}
    for case, sparse, dense in pairs:
        if sparse in of and dense in of:
            row = Row("sparse over dense", case, unit=_TIMES)
            row.rate = of[dense].milliseconds / of[sparse].milliseconds
            row.target = aims.get(case) if aim in BACKWARD_AND_LOSS else None
            row.reached = None if row.target is None else row.rate >= row.target
            combined.append(row)
    return combined


def _rate_flops(row: Row, flops: float, dtype: str, ceilings: Ceilings, chip: Chip | None) -> None:
    """Rate and shares of a row, and whether its target is reached."""
    row.rate, row.unit = flops / 1e12, _TFLOPS
    ceiling = ceilings.of(dtype)
    row.of_ceiling = flops / ceiling if ceiling else None
    if chip:
        row.of_peak = flops / (chip.e4m3 if dtype == "e4m3" else chip.bf16)
        row.reached = None if row.target is None else row.of_peak >= row.target

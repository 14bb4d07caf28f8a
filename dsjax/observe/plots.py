"""Pictures: of a run, from its ``metrics.jsonl``, and of the documents it trains on."""

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from dsjax.observe.metrics import read

_BLUE, _ORANGE, _GREEN, _PURPLE, _GREY = "#2f6fab", "#d9822b", "#3a8f5c", "#7a5aa6", "#8a8a8a"


def loss_plot(metrics_path: str | os.PathLike[str], png_path: str | os.PathLike[str]) -> None:
    """Draws what the file has over the steps, a panel each.

    ``train/loss`` with ``train/mtp_loss``; ``eval/bits_per_byte`` with the untrained model's (its value at
    step 0) dashed; ``moe/load_max_over_mean``; ``indexer/kl``.

    A Figure of its own and no pyplot: a notebook's backend and open figures stay as they are.
    """
    lines = read(metrics_path)
    drawn = [panel for panel in _PANELS if any(panel.name in line for line in lines)]
    columns = min(len(drawn), 2) or 1
    rows = -(-len(drawn) // columns) or 1
    figure = Figure(
        figsize=(5.6 * columns, 3.5 * rows), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    )
    FigureCanvasAgg(figure)
    if not drawn:
        figure.text(0.5, 0.5, "no metrics yet", ha="center", color=_GREY)
    for place, panel in enumerate(drawn, start=1):
        axes = figure.add_subplot(rows, columns, place)
        panel.draw(axes, lines)
        axes.set_title(panel.title, loc="left")
        axes.set_xlabel("step")
        axes.set_xlim(0, max(lines[-1]["step"], 1))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    figure.savefig(png_path, dpi=150)


def length_histogram(
    lengths: Mapping[str, np.ndarray], sequence_length: int, png_path: str | os.PathLike[str]
) -> None:
    """Draws how many tokens stand in documents of which length, for each source, and where a sequence ends.

    ``lengths`` are tokens of documents. Bars are by tokens, not by documents: it is tokens that training reads.
    """
    every = np.maximum(np.concatenate([[sequence_length], *lengths.values()]), 1)
    edges = 2.0 ** np.arange(np.floor(np.log2(every.min())), np.ceil(np.log2(every.max())) + 1.01)
    figure = Figure(figsize=(7.2, 3.6), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.hist(
        list(lengths.values()), edges, weights=list(lengths.values()), stacked=True, label=list(lengths)
    )
    axes.axvline(sequence_length, color=_GREY, linestyle="--", linewidth=1)
    axes.annotate(
        f"sequence {sequence_length:,}",
        (sequence_length, 1),
        xycoords=("data", "axes fraction"),
        xytext=(4, -10),
        textcoords="offset points",
        color=_GREY,
    )
    axes.set_xscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_title("Tokens by the length of their document", loc="left")
    axes.set_xlabel("tokens of a document")
    axes.set_ylabel("tokens")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(png_path, dpi=150)


def smooth(values: np.ndarray, half_window: int) -> np.ndarray:
    """The mean of each value and up to ``half_window`` on either side, as many as both sides have.

    So the ends stay where they are. Only finite values count.
    """
    finite = np.isfinite(values)
    totals = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    place = np.arange(len(values))
    half = np.minimum(half_window, np.minimum(place, place[::-1]))
    before, after = place - half, place + half + 1
    count = counts[after] - counts[before]
    return np.where(count > 0, (totals[after] - totals[before]) / np.maximum(count, 1), np.nan)


def _series(lines: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps that have the metric, and its values there."""
    found = [(line["step"], line[name]) for line in lines if name in line]
    steps, values = zip(*found, strict=True) if found else ((), ())
    return np.array(steps, float), np.array(values, float)


def _draw_losses(axes: Axes, lines: list[dict[str, Any]]) -> None:
    _raw_and_smooth(axes, *_series(lines, "train/loss"), _BLUE, "next token")
    steps, values = _series(lines, "train/mtp_loss")
    if len(steps):
        _raw_and_smooth(axes, steps, values, _ORANGE, "the one after it (MTP)")
        axes.legend(frameon=False)


def _draw_bits_per_byte(axes: Axes, lines: list[dict[str, Any]]) -> None:
    steps, values = _series(lines, "eval/bits_per_byte")
    axes.plot(steps, values, color=_GREEN, marker="o", markersize=4, clip_on=False)
    last = f"{values[-1]:.2f}"
    axes.annotate(last, (steps[-1], values[-1]), xytext=(0, 7), textcoords="offset points", ha="right")
    axes.set_ylim(bottom=0)
    if steps[0] == 0:
        _level(axes, values[0], f"untrained {values[0]:.2f}", offset=-12)


def _draw_load(axes: Axes, lines: list[dict[str, Any]]) -> None:
    _raw_and_smooth(axes, *_series(lines, "moe/load_max_over_mean"), _PURPLE)
    axes.set_ylim(bottom=0.9)
    _level(axes, 1, "perfect balance", offset=4)


def _draw_indexer(axes: Axes, lines: list[dict[str, Any]]) -> None:
    _raw_and_smooth(axes, *_series(lines, "indexer/kl"), _ORANGE)
    axes.set_ylim(bottom=0)


def _raw_and_smooth(axes: Axes, steps: np.ndarray, values: np.ndarray, color: str, label: str = "") -> None:
    axes.plot(steps, values, color=color, alpha=0.4, linewidth=0.8)
    axes.plot(steps, smooth(values, half_window=len(values) // 24), color=color, linewidth=1.8, label=label)


def _level(axes: Axes, value: float, text: str, *, offset: int) -> None:
    """A dashed line across, with its text at the right; ``offset`` is in points above the line."""
    axes.axhline(value, color=_GREY, linestyle="--", linewidth=1)
    axes.annotate(
        text,
        (1, value),
        xycoords=("axes fraction", "data"),
        xytext=(-4, offset),
        textcoords="offset points",
        ha="right",
        color=_GREY,
    )


class _Panel(NamedTuple):
    name: str  # drawn if this metric is there
    title: str
    draw: Callable[[Axes, list[dict[str, Any]]], None]


_PANELS = (
    _Panel("train/loss", "Training loss (nats a token)", _draw_losses),
    _Panel("eval/bits_per_byte", "Held-out text (bits a byte)", _draw_bits_per_byte),
    _Panel("moe/load_max_over_mean", "Load of the busiest expert (over the mean)", _draw_load),
    _Panel("indexer/kl", "Indexer: KL from attention (nats a query)", _draw_indexer),
)

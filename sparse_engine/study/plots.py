"""Quality against speed and against size, as SVG that stands inside the report."""

from __future__ import annotations

import importlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

from sparse_engine.errors import InputError

__all__ = ["quality_plot", "spread_out"]

_MARKERS = "osD^vP*X"


def quality_plot(lines: Sequence[Mapping[str, Any]], x: str, label: str, *, y: str = "test_rougeL", log: bool = False) -> str | None:
    """Test ROUGE-L with its 95 % interval over the column ``x``, one point per row; None where no row has both.

    Colour tells the pruning and marker the technique. Rows' names stand in a column beside the axes, with lines to their points, which
    may lie close together.

    Raises:
        InputError: matplotlib is not installed.
    """
    points = [line for line in lines if line.get(x) is not None and line.get(y) is not None]
    if not points:
        return None
    try:
        figure_module = importlib.import_module("matplotlib.figure")
        matplotlib = importlib.import_module("matplotlib")
    except ModuleNotFoundError:
        raise InputError("plots need the matplotlib package: pip install 'sparse-engine[eval]'") from None
    # Of all rows, so that a colour means the same in every plot of a study; the legend has those of this one.
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(map(_pruning, lines)))}
    markers = {name: _MARKERS[i % len(_MARKERS)] for i, name in enumerate(dict.fromkeys(str(line["technique"]) for line in lines))}
    used = {_pruning(p) for p in points}, {str(p["technique"]) for p in points}
    # A fixed salt and no date give the same file for the same figures; text stays text.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "study", "font.size": 9}):
        legends = 2 + -(-sum(map(len, used)) // 3)
        figure = figure_module.Figure(figsize=(9, max(4.5, 0.17 * len(points)) + 0.17 * legends), layout="constrained")
        axes = figure.subplots()
        for p in points:
            colour, marker = colours[_pruning(p)], markers[str(p["technique"])]
            spread = [[p[y] - p[f"{y}_low"]], [p[f"{y}_high"] - p[y]]]
            axes.errorbar(p[x], p[y], yerr=spread, fmt=marker, color=colour, capsize=2, markersize=6, elinewidth=0.8)
        for name in (name for name in colours if name in used[0]):
            axes.plot([], [], "o", color=colours[name], label="not pruned" if name == "– –" else name)
        for name in (name for name in markers if name in used[1]):
            axes.plot([], [], markers[name], color="0.4", label="not fine-tuned" if name == "–" else name)
        axes.margins(x=0.05, y=0.05)
        if log:
            axes.set_xscale("log")
        low, high = axes.get_ylim()
        axes.set_ylim(low, high)
        for p, height in zip(points, spread_out([(p[y] - low) / (high - low) for p in points], 1 / max(24, len(points))), strict=True):
            axes.annotate(
                p["id"],
                (p[x], p[y]),
                xytext=(1.03, height),
                textcoords="axes fraction",
                fontsize=7,
                color="0.25",
                va="center",
                arrowprops={"arrowstyle": "-", "color": "0.75", "linewidth": 0.5, "relpos": (0, 0.5), "shrinkA": 0, "shrinkB": 3},
            )
        axes.set_xlabel(label)
        axes.set_ylabel("test ROUGE-L")
        axes.grid(alpha=0.3)
        figure.legend(fontsize=7, loc="outside lower center", ncols=3, frameon=False)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    svg = stream.getvalue()
    return svg[svg.index("<svg") :]


def _pruning(line: Mapping[str, Any]) -> str:
    return f"{line['pruning']} {line['sparsity']}"


def spread_out(wanted: Sequence[float], gap: float) -> list[float]:
    """Places between 0 and 1 in the order of ``wanted`` ones, near them, and at least ``gap`` apart if there is room for all."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [0.0] * len(wanted)
    least = 0.0
    for i in order:
        placed[i] = least = max(wanted[i], least)
        least += gap
    most = 1.0
    for i in reversed(order):
        placed[i] = most = min(placed[i], most)
        most -= gap
    return placed

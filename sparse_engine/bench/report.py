"""What the latency suite's results look like: Markdown tables by size class, model and shape, and a plot of the speed-ups."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from sparse_engine.bench.suite import REGIMES

__all__ = ["by_class", "by_model", "by_rows", "by_shape", "by_width", "geometric_mean", "linear_tables", "plot", "table", "unique"]

Row = dict[str, Any]

_MB = 1e6
CLASSES: dict[str, Callable[[Row], bool]] = {
    "M = 1, dense weight of 128 MB and more": lambda row: row["m"] == 1 and _dense_mb(row) >= 128,
    "M = 1, 32 to 128 MB": lambda row: row["m"] == 1 and 32 <= _dense_mb(row) < 128,
    "M = 1, 8 to 32 MB": lambda row: row["m"] == 1 and 8 <= _dense_mb(row) < 32,
    "M = 1, OPT-125m": lambda row: row["m"] == 1 and row["model"] == "opt-125m",
    "M = 2 … 16, 128 MB and more": lambda row: 2 <= row["m"] <= 16 and _dense_mb(row) >= 128,
    "M = 32 … 64, 32 MB and more": lambda row: 32 <= row["m"] <= 64 and _dense_mb(row) >= 32,
    "M = 128, 32 MB and more": lambda row: row["m"] == 128 and _dense_mb(row) >= 32,
}
"""Classes of products that are bound by the same thing."""
_VALUE_BYTES = {"fp32": 4}


def _dense_mb(row: Row) -> float:
    return float(row["n"] * row["k"] * _VALUE_BYTES.get(row["values"], 2) / _MB)


def geometric_mean(values: Iterable[float]) -> float:
    """exp of the mean logarithm of ``values``, at least one and all above 0."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def table(header: list[str], body: Iterable[list[str]]) -> str:
    """A Markdown table; every row of ``body`` has as many cells as ``header``."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *body)]
    return "\n".join(lines) + "\n"


def unique(rows: list[Row], key: str) -> list[Any]:
    """The values of ``key``, each once, in the order in which they first come."""
    return list(dict.fromkeys(row[key] for row in rows))


def linear_tables(content: dict[str, Any]) -> str:
    """The tables that fit the results: by size class and by model where there are many shapes, else by shape."""
    rows = content["rows"]
    if content["environment"].get("gpu") and min(row["m"] for row in rows) >= min(REGIMES["prefill"]):
        return by_rows(rows) + "\n" + by_model(rows, (256, 1024, 4096))
    if len({(row["n"], row["k"]) for row in rows}) > 12:
        return by_class(rows) + "\n" + by_model(rows, (1, 16, 64))
    if len({row["m"] for row in rows}) > 1:
        return by_width(rows) + "\n" + by_shape(rows)
    return by_shape(rows)


def _columns(rows: list[Row]) -> list[tuple[str, str]]:
    """The patterns and values that were measured together."""
    found = [(pattern, values) for values in unique(rows, "values") for pattern in unique(rows, "pattern")]
    return [column for column in found if any((row["pattern"], row["values"]) == column for row in rows)]


def by_class(rows: list[Row]) -> str:
    """Geometric means over the shapes of a class: speed-up over torch's dense linear, over the best dense product in brackets, and the
    share of the time that reading the packed bytes takes."""
    columns = _columns(rows)
    body = []
    for name, belongs in CLASSES.items():
        cells = [[row for row in rows if belongs(row) and (row["pattern"], row["values"]) == column] for column in columns]
        if any(cells):
            body.append([name, *(_speed(cell) + _share(cell) for cell in cells), _versus_cusparselt([row for c in cells for row in c])])
    heading = ["geometric means", *(f"{pattern} {values}" for pattern, values in columns), "2:4 over searched cuSPARSELt"]
    return table(heading, body)


def by_model(rows: list[Row], counts: tuple[int, ...]) -> str:
    """Geometric means over a model's layers, at these numbers of activation rows; of the first type of values."""
    rows = [row for row in rows if row["values"] == rows[0]["values"]]
    columns = [(pattern, m) for pattern in unique(rows, "pattern") for m in counts]
    body = []
    for model in unique(rows, "model"):
        cells = [[row for row in rows if (row["model"], row["pattern"], row["m"]) == (model, *column)] for column in columns]
        body.append([model, *(_speed(cell) for cell in cells)])
    return table(["linears of", *(f"{pattern}, M = {m}" for pattern, m in columns)], body)


WIDTHS: dict[str, Callable[[Row], bool]] = {
    "2048 wide and more": lambda row: min(row["n"], row["k"]) >= 2048,
    "narrower": lambda row: min(row["n"], row["k"]) < 2048,
}


def by_rows(rows: list[Row]) -> str:
    """Geometric means on a GPU for each number of rows: speed-up over torch's dense linear, over the best dense product in brackets, and
    the limit's share of the time; of 8-bit values also where activations come as levels (and leave as such, where that was measured);
    then the medians of the clock and the power beside them."""
    columns = _columns(rows)
    levelled = [column for column in columns if any(_of_levels(row) for row in rows if (row["pattern"], row["values"]) == column)]
    body = []
    for m in sorted(unique(rows, "m")):
        for name, belongs in WIDTHS.items():
            of_class = [row for row in rows if belongs(row) and row["m"] == m]
            if not of_class:
                continue
            cells = [[row for row in of_class if (row["pattern"], row["values"]) == column] for column in columns]
            given = [[row for row in of_class if (row["pattern"], row["values"]) == column] for column in levelled]
            conditions = [_median(of_class, "sm_mhz", "MHz"), _median(of_class, "power_w", "W")]
            speeds = [*(_speed(cell) + _share(cell) for cell in cells), *map(_speed_of_levels, given)]
            body.append([f"M = {m}, {name}", *speeds, _versus_cusparselt(of_class), *conditions])
    names = [*(f"{pattern} {values}" for pattern, values in columns), *(f"{pattern} {values} of levels" for pattern, values in levelled)]
    return table(["geometric means", *names, "2:4 over searched cuSPARSELt", "clock", "power"], body)


def _of_levels(row: Row) -> float | None:
    """Microseconds of the product whose activations are levels already."""
    found: float | None = row.get("levels_to_levels_us") or row.get("of_levels_us")
    return found


def _speed_of_levels(rows: list[Row]) -> str:
    ratios = [row["dense_us"] / us for row in rows if (us := _of_levels(row)) is not None]
    return f"{geometric_mean(ratios):.2f}×" if ratios else "–"


def _median(rows: list[Row], name: str, unit: str) -> str:
    values = [row[name] for row in rows if row.get(name) is not None]
    return f"{statistics.median(values):.0f} {unit}" if values else "–"


def by_width(rows: list[Row]) -> str:
    """Geometric means over the shapes of 2048-wide models and wider, and of narrower ones, for each number of rows."""
    columns = _columns(rows)
    body = []
    for m in sorted(unique(rows, "m")):
        for name, belongs in WIDTHS.items():
            cells = [
                [row for row in rows if belongs(row) and (row["m"], row["pattern"], row["values"]) == (m, *column)] for column in columns
            ]
            if any(cells):
                body.append([f"M = {m}, {name}", *(_speed(cell) for cell in cells)])
    return table(["geometric means", *(f"{pattern} {values}" for pattern, values in columns)], body)


def by_shape(rows: list[Row]) -> str:
    """Each shape at the smallest number of rows measured, small shapes first."""
    least = min(row["m"] for row in rows)
    rows = [row for row in rows if row["m"] == least]
    columns = _columns(rows)
    body = []
    for n, k in sorted({(row["n"], row["k"]) for row in rows}, key=lambda shape: (shape[0] * shape[1], shape)):
        found = {(row["pattern"], row["values"]): [row] for row in rows if (row["n"], row["k"]) == (n, k)}
        body.append([f"{n} × {k}", *(_speed(found.get(column, [])) for column in columns)])
    return table([f"out × in, M = {least}", *(f"{pattern} {values}" for pattern, values in columns)], body)


def _speed(rows: list[Row]) -> str:
    if not rows:
        return "–"
    over_torch, over_best = (geometric_mean(row[key] / row["us"] for row in rows) for key in ("dense_us", "best_dense_us"))
    return f"{over_torch:.2f}× ({over_best:.2f}×)"


def _share(rows: list[Row]) -> str:
    shares = [row["limit_share"] for row in rows if row["limit_share"] is not None]
    return f", {geometric_mean(shares):.0%}" if shares else ""


def _versus_cusparselt(rows: list[Row]) -> str:
    measured = [row["cusparselt_us"] / row["us"] for row in rows if row["cusparselt_us"] is not None]
    return f"{geometric_mean(measured):.2f}×" if measured else "–"


def plot(content: dict[str, Any], path: Path) -> None:
    """Write an SVG to ``path``: speed-up over the best dense kernel against M, geometric mean over the shapes; dense = 1.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("svg")
    # Without these two the same figures would give another file each time.
    mpl.rcParams["svg.hashsalt"] = "sparse-engine"
    import matplotlib.pyplot as plt

    rows = content["rows"]
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for pattern, values in _columns(rows):
        points = [row for row in rows if (row["values"], row["pattern"]) == (values, pattern)]
        places = sorted({row["m"] for row in points})
        means = [geometric_mean(row["best_dense_us"] / row["us"] for row in points if row["m"] == m) for m in places]
        axes.plot(places, means, marker="o", label=f"{pattern} {values}")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="activation rows M", ylabel="speed-up over the best dense kernel", ylim=(0, None))
    axes.set_xticks(sorted({row["m"] for row in rows}), labels=[str(m) for m in sorted({row["m"] for row in rows})])
    axes.minorticks_off()
    axes.set_title(content["environment"].get("gpu") or content["environment"].get("cpu") or path.parent.name, fontsize=9)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)

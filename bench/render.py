"""Writes the README's measured tables and its plot from the JSON under bench/results; `--check` only says whether they are current.

A block in README.md between `<!-- results: NAME DEVICE -->` and `<!-- /results -->` is replaced by the table of
bench/results/DEVICE/NAME.json.

    python bench/render.py
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
BLOCK = re.compile(r"(<!-- results: (\S+) (\S+) -->\n).*?(<!-- /results -->)", re.DOTALL)

Row = dict[str, Any]


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def table(header: list[str], body: Iterable[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *body)]
    return "\n".join(lines) + "\n"


def unique(rows: list[Row], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def linear(content: dict[str, Any]) -> str:
    """Speed-ups over torch's dense linear, over the best dense product in brackets: per shape at M = 1, or per model where
    there are many shapes (then geometric means over its layers, at several M)."""
    rows = content["rows"]
    if len({(row["n"], row["k"]) for row in rows}) > 12:
        return _by_model(rows)
    rows = [row for row in rows if row["m"] == 1]
    columns = [(pattern, values) for values in unique(rows, "values") for pattern in unique(rows, "pattern")]
    body = []
    for n, k in sorted({(row["n"], row["k"]) for row in rows}, key=lambda shape: (shape[0] * shape[1], shape)):
        found = {(row["pattern"], row["values"]): [row] for row in rows if (row["n"], row["k"]) == (n, k)}
        body.append([f"{n} × {k}", *(_speed(found.get(column, [])) for column in columns)])
    return table(["out × in, M = 1", *(f"{pattern} {values}" for pattern, values in columns)], body)


def _by_model(rows: list[Row]) -> str:
    columns = [(pattern, m) for pattern in unique(rows, "pattern") for m in (1, 16, 64)]
    body = []
    for model in unique(rows, "model"):
        cells = [[row for row in rows if (row["model"], row["pattern"], row["m"]) == (model, *column)] for column in columns]
        body.append([model, *(_speed(cell) for cell in cells)])
    return table(["linears of", *(f"{pattern}, M = {m}" for pattern, m in columns)], body)


def _speed(rows: list[Row]) -> str:
    if not rows:
        return "–"
    over_torch, over_best = (geometric_mean(row[key] / row["us"] for row in rows) for key in ("dense_us", "best_dense_us"))
    return f"{over_torch:.2f}× ({over_best:.2f}×)"


def quality(content: dict[str, Any]) -> str:
    rows = content["rows"]
    patterns = [pattern for pattern in unique(rows, "pattern") if pattern != "dense"]
    dense = next(row for row in rows if row["pattern"] == "dense")
    found = {(row["pruner"], row["pattern"]): row for row in rows}
    body = [["dense", *[f"{dense['perplexity']:.2f}"] * len(patterns), "–", "–"]]
    for pruner in ("magnitude", "wanda", "sparsegpt"):
        cells = [found[pruner, pattern] for pattern in patterns if (pruner, pattern) in found]
        if not cells:
            continue
        seconds = max(row["convert_seconds"] for row in cells)
        peak = max(row["convert_peak_rss_bytes"] for row in cells)
        body.append([pruner, *(f"{row['perplexity']:.2f}" for row in cells), f"{seconds:.0f} s", f"{peak / 2**20:.0f} MiB"])
    return table(["perplexity", *patterns, "convert, at most", "peak memory, at most"], body)


def sizes(content: dict[str, Any]) -> str:
    body = []
    for row in content["rows"]:
        megabytes = f"{row['dense_bytes'] / 1e6:.0f} MB"
        body.append([row["pattern"], megabytes, f"{row['disk_ratio']:.3f}", f"{row['tensor_ratio']:.3f}", f"{row['rss_ratio']:.3f}"])
    return table(["pattern", "dense linears", "packed / dense on disk", "as tensors", "resident memory"], body)


def summaries(content: dict[str, Any]) -> str:
    header = ["engine", "weight file", "prompt, s", "decode, tokens/s", "ROUGE-L"]
    body = []
    for row in content["rows"]:
        speed = [f"{row['prompt_seconds']:.1f}", f"{row['decode_tokens_per_s']:.0f}"]
        body.append([row["engine"], f"{row['weight_bytes'] / 1e6:.1f} MB", *speed, f"{100 * row['rougeL']:.1f}"])
    return table(header, body)


RENDERERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "linear-decode": linear,
    "pruning-quality": quality,
    "size-and-memory": sizes,
    "summarise-summ-28m-bf16": summaries,
    "summarise-summ-28m-fp32": summaries,
}


def plot(path: Path) -> None:
    """Speed-up over the best dense kernel against M, geometric mean over the shapes, one line per pattern and type; dense = 1."""
    import matplotlib as mpl

    mpl.use("svg")
    # Without these two the same figures would give another file each time.
    mpl.rcParams["svg.hashsalt"] = "sparse-engine"
    import matplotlib.pyplot as plt

    content = json.loads(path.read_text())
    rows = content["rows"]
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for values in unique(rows, "values"):
        for pattern in unique(rows, "pattern"):
            points = [row for row in rows if (row["values"], row["pattern"]) == (values, pattern)]
            places = sorted({row["m"] for row in points})
            means = [geometric_mean(row["best_dense_us"] / row["us"] for row in points if row["m"] == m) for m in places]
            axes.plot(places, means, marker="o", label=f"{pattern} {values}")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="activation rows M", ylabel="speed-up over the best dense kernel", ylim=(0, None))
    axes.set_xticks(sorted({row["m"] for row in rows}), labels=[str(m) for m in sorted({row["m"] for row in rows})])
    axes.minorticks_off()
    axes.set_title(f"{path.parent.name}: {content['environment'].get('cpu') or ''}", fontsize=9)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def render(text: str) -> str:
    def fill(match: re.Match[str]) -> str:
        content = json.loads((RESULTS / match[3] / f"{match[2]}.json").read_text())
        made = f"\nMeasured by `{content['environment']['command']}` ([JSON](bench/results/{match[3]}/{match[2]}.json)).\n"
        return match[1] + RENDERERS[match[2]](content) + made + match[4]

    return BLOCK.sub(fill, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if README.md is not current")
    settings = parser.parse_args()
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = render(before)
    if settings.check:
        return int(before != after)
    readme.write_text(after)
    for path in sorted(RESULTS.glob("*/linear-*.json")):
        plot(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

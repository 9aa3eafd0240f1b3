"""Writes the README's measured tables and its plot from the JSON under bench/results; `--check` only says whether they are current.

A block in README.md between `<!-- results: NAME DEVICE -->` and `<!-- /results -->` is replaced by the table of
bench/results/DEVICE/NAME.json, and empty as long as there is none.

    python bench/render.py
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparse_engine.bench.report import linear_tables, plot, table, unique

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
BLOCK = re.compile(r"(<!-- results: (\S+) (\S+) -->\n).*?(<!-- /results -->)", re.DOTALL)


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


_WAYS = {
    ("forward", "float32"): "forward",
    ("forward as on a GPU", "bfloat16"): "bf16 forward, activations as on a GPU",
    ("decode step", "float32"): "decode step",
    ("decode step", "int8"): "with an int8 head",
}


def quantised(content: dict[str, Any]) -> str:
    """Perplexity of a pruned model by the type of its values and the way that it runs, and its change against the model's own type."""
    rows = content["rows"]
    found = {(row["values"], row["path"], row["head"]): row for row in rows}
    order = sorted(unique(rows, "values"), key=lambda values: -found[values, "forward", "float32"]["packed_linear_nbytes"])
    ways = {way: label for way, label in _WAYS.items() if (order[0], *way) in found}
    body = []
    for values in order:
        cells = [f"{found[values, 'forward', 'float32']['packed_linear_nbytes'] / 1e6:.1f} MB"]
        for way in ways:
            row, own = found.get((values, *way)), found[order[0], *way]
            change = "" if row is own or row is None else f" ({row['perplexity'] / own['perplexity'] - 1:+.2%})"
            cells.append("–" if row is None else f"{row['perplexity']:.3f}{change}")
        body.append([values, *cells])
    return table(["values", "packed linears", *(f"perplexity, {label}" for label in ways.values())], body)


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


_ENGINES = {
    "hf-eager": "transformers",
    "hf-static": "transformers, static cache, compiled",
    "sparse-engine": "engine",
    "llama.cpp": "llama.cpp",
}


def generation(content: dict[str, Any]) -> str:
    """Milliseconds per token of every way to run a model, with the speed-up over the engine's own dense model."""
    rows = content["rows"]
    rows = [row | {"values": _values(row)} for row in rows]
    ways = list(dict.fromkeys((row["engine"], row["pattern"], row["values"]) for row in rows))
    found = {(row["model"], row["batch"], row["engine"], row["pattern"], row["values"]): row for row in rows}
    body = []
    for model, batch in dict.fromkeys((row["model"], row["batch"]) for row in rows):
        dense = found.get((model, batch, "sparse-engine", "dense", "bf16"))
        cells = [f"{model}, batch {batch}"]
        for way in ways:
            row = found.get((model, batch, *way))
            if row is None:
                cells.append("–")
                continue
            gain = f" ({dense['ms_per_token'] / row['ms_per_token']:.2f}×)" if dense and row is not dense else ""
            cells.append(f"{row['ms_per_token']:.3g} ms{gain}")
        body.append(cells)
    made = table(["ms per token", *(_way(way) for way in ways)], body)
    if content["environment"].get("gpu"):
        made += _gains(found)
    budgets = content.get("budgets")
    return f"{made}\n{budget_table(budgets)}" if budgets else made


Found = dict[tuple[Any, ...], dict[str, Any]]


def _way(way: tuple[str, str, str]) -> str:
    engine, pattern, values = way
    return f"{_ENGINES[engine]}, {pattern} {values}"


def _gains(found: Found) -> str:
    """What 2:4 gains over the dense ways to run the same model and what the other patterns cost beside it; nothing without 2:4."""
    body = []
    for model, batch in dict.fromkeys(key[:2] for key in found):
        packed = found.get((model, batch, "sparse-engine", "2:4", "bf16"))
        if packed is None:
            continue
        dense, static, eager = (found.get((model, batch, engine, "dense", "bf16")) for engine in ("sparse-engine", "hf-static", "hf-eager"))
        others = [found.get((model, batch, "sparse-engine", pattern, "bf16")) for pattern in ("4:8", "unstructured")]
        gains = [f"{row['ms_per_token'] / packed['ms_per_token']:.2f}×" if row else "–" for row in (dense, static, eager)]
        costs = [f"{row['ms_per_token'] / packed['ms_per_token'] - 1:+.0%}" if row else "–" for row in others]
        rates = " / ".join(f"{row['tokens_per_s']:.0f}" if row else "–" for row in (packed, dense, eager))
        firsts = " / ".join(_milliseconds(row) for row in (packed, dense, eager))
        peaks = " / ".join(_gigabytes(row) for row in (packed, dense, eager))
        body.append([f"{model}, batch {batch}", *gains, *costs, firsts, rates, peaks])
    if not body:
        return ""
    header = ["2:4 in the engine", "over its dense", "over transformers, compiled", "over transformers", "4:8 takes", "unstructured takes"]
    header += ["ms to the first token: 2:4 / dense / transformers", "tokens/s, prompt included: the same", "peak memory, GB: the same"]
    return "\n" + table(header, body)


def _milliseconds(row: dict[str, Any] | None) -> str:
    return f"{row['prefill_ms']:.{0 if row['prefill_ms'] >= 100 else 1}f}" if row else "–"


def _gigabytes(row: dict[str, Any] | None) -> str:
    return f"{row['peak_bytes'] / 1e9:.2f}" if row and row.get("peak_bytes") else "–"


def documents(content: dict[str, Any]) -> str:
    """Seconds for all documents, some of them at a time, and how much of a step's traffic is the cache of keys and values."""
    rows = content["rows"]
    ways = list(dict.fromkeys((row["engine"], row["pattern"], row["values"]) for row in rows))
    found = {(row["batch"], row["engine"], row["pattern"], row["values"]): row for row in rows}
    body = []
    for batch in sorted(unique(rows, "batch")):
        dense = found.get((batch, "sparse-engine", "dense", "bf16"))
        cells = []
        for way in ways:
            row = found.get((batch, *way))
            gain = f" ({dense['total_s'] / row['total_s']:.2f}×)" if dense and row and row is not dense else ""
            cells.append(f"{row['total_s']:.2f} s{gain}, {_gigabytes(row)} GB" if row else "–")
        packed = found.get((batch, "sparse-engine", "2:4", "bf16"))
        share = f"{packed['cache_bytes'] / (packed['cache_bytes'] + packed['weight_bytes']):.0%}" if packed else "–"
        body.append([f"{batch} at a time", *cells, share])
    return table(["all documents", *(_way(way) for way in ways), "cache, of what a 2:4 step reads"], body)


def _values(row: dict[str, Any]) -> str:
    return row["values"] + (", int8 head" if row.get("head", "bf16") == "int8" else "")


def budget_table(budgets: list[dict[str, Any]]) -> str:
    """Where the microseconds of a step go, a row for each model and pattern; parts below one percent are left out."""
    body = []
    for found in budgets:
        parts = [f"{part['part']} {part['us']:.0f} ({part['share']:.0%})" for part in found["parts"] if part["share"] >= 0.01]
        step = f"{found['model']}, {found['pattern']} {_values(found)}, batch {found['batch']}"
        body.append([step, f"{sum(part['us'] for part in found['parts']):.0f}", ", ".join(parts)])
    return table(["kernels of a step", "µs", "where they go"], body)


def study(content: dict[str, Any]) -> str:
    """What a study's rows keep of their dense model, and what they gain."""
    body = []
    for row in content["rows"]:
        recovered = [f"{row[name]:.1%}" if row[name] is not None else "–" for name in ("rougeL_recovery", "likelihood_recovery")]
        speed = f"{row['token_ms_batch_1']:.3f} ms" if row["token_ms_batch_1"] else "–"
        speed += f" ({row['speedup_batch_1']:.2f}×)" if row["speedup_batch_1"] else ""
        how = ", ".join(part for part in (row["pruning"], row["sparsity"], row["technique"]) if part != "–")
        body.append([row["id"], how, f"{row['test_rougeL']:.4f}", *recovered, speed, f"{row['size_ratio']:.2f}×"])
    header = ["row", "how", "test ROUGE-L", "of the dense model's ROUGE-L", "of its log-likelihood", "per token, batch 1", "size"]
    return table(header, body)


RENDERERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "linear-decode": linear_tables,
    "linear-prefill": linear_tables,
    "generate": generation,
    "generate-documents": documents,
    "study-offline-28m": study,
    "pruning-quality": quality,
    "quantisation-quality": quantised,
    "size-and-memory": sizes,
    "summarise-summ-28m-bf16": summaries,
    "summarise-summ-28m-fp32": summaries,
}


def render(text: str) -> str:
    def fill(match: re.Match[str]) -> str:
        if not (path := RESULTS / match[3] / f"{match[2]}.json").is_file():
            return match[1] + match[4]
        content = json.loads(path.read_text())
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
        plot(json.loads(path.read_text()), path.with_suffix(".svg"))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The report of a study: Markdown, CSV, JSON, and one HTML page that needs nothing beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from sparse_engine.errors import InputError
from sparse_engine.study.plots import quality_plot
from sparse_engine.study.recipe import SPLITS, Recipe
from sparse_engine.study.rows import table_line
from sparse_engine.study.tables import Column, comparison_columns, csv_text, markdown, study_columns

__all__ = ["write_report"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2430; margin: 2rem auto; max-width: 1500px; padding: 0 1.5rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; border-bottom: 1px solid #d5dbe3; padding-bottom: .2rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; }
th, td { border-bottom: 1px solid #e3e8ee; padding: .3rem .6rem; text-align: right; white-space: nowrap; vertical-align: top; }
th { background: #f2f5f8; } td.text, th.text { text-align: left; } tr:hover td { background: #f8fafc; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; } .plots svg { max-width: 100%; height: auto; }
table.examples td { white-space: normal; text-align: left; min-width: 8rem; } table.examples td.out { width: 100%; }
pre { background: #f6f8fa; padding: 1rem; overflow-x: auto; font-size: 12px; } .note { color: #5a6675; } .blank { color: #b3261e; }
"""


def write_report(recipe: Recipe, results: Mapping[str, Mapping[str, Any]], folder: Path, command: str) -> list[Path]:
    """Write table.md, table.csv, study.json and report.html of the rows in ``results`` (by id); rows not run yet are named.

    Raises:
        InputError: there is no finished row.
    """
    done = [results[name] for name in recipe.rows if name in results]
    if not done:
        raise InputError("no row of the recipe is finished yet: run the study first")
    missing = [name for name in recipe.rows if name not in results]
    lines = [table_line(result, results.get(recipe.dense[result["model"]])) for result in done]
    tables = (("Table 3", study_columns()), ("What the published table lacked", comparison_columns(lines)))
    environment = dict(done[-1]["evaluated_on"]) | {"command": command}
    notes = _notes(done, missing)
    files = {
        "table.md": _markdown(recipe, tables, lines, notes, command),
        "table.csv": csv_text(lines),
        "study.json": json.dumps({"environment": environment, "rows": lines}, indent=1) + "\n",
        "report.html": _html(recipe, tables, lines, done, notes, environment),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        temporary = folder / (name + ".tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(folder / name)
    return [folder / name for name in files]


def _notes(done: Sequence[Mapping[str, Any]], missing: Sequence[str]) -> list[str]:
    notes = [
        "Published values are in square brackets; ± is half of the 95 % bootstrap interval over the examples.",
        "Time is that of generating the summaries of all splits. Speed-ups compare milliseconds per token, at a fixed number of new "
        "tokens, with the dense fine-tuned row of the same model, run by the same engine on the same device in the same type.",
        "Size is that of the weight files needed to run the row; an adapter counts with its base.",
    ]
    if missing:
        notes.append(f"Rows not run yet: {', '.join(missing)}.")
    skipped = {name: why for row in done for split in row["splits"].values() for name, why in split["skipped"].items()}
    notes += [f"{name} was not measured: {why}" for name, why in skipped.items()]
    devices = sorted({str(row["cost"]["device"]) for row in done})
    notes.append(f"Run on: {', '.join(devices)}.")
    return notes


def _markdown(
    recipe: Recipe,
    tables: Sequence[tuple[str, Sequence[Column]]],
    lines: Sequence[Mapping[str, Any]],
    notes: Sequence[str],
    command: str,
) -> str:
    parts = [f"# Study {recipe.name}\n"]
    for title, columns in tables:
        parts += [f"## {title}\n", markdown(columns, lines)]
    parts += [*(f"- {note}" for note in notes), f"\nMade by `{command}`.\n"]
    return "\n".join(parts)


def _html(
    recipe: Recipe,
    tables: Sequence[tuple[str, Sequence[Column]]],
    lines: Sequence[Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]],
    notes: Sequence[str],
    environment: Mapping[str, Any],
) -> str:
    body = [f"<h1>Study {escape(recipe.name)}</h1>"]
    for title, columns in tables:
        body += [f"<h2>{escape(title)}</h2>", _table(columns, lines)]
    body.append("<ul>" + "".join(f"<li class='note'>{escape(note)}</li>" for note in notes) + "</ul>")
    body += ["<h2>Quality against speed and size</h2>", _plots(lines)]
    for split in SPLITS:
        if any(split in result["splits"] for result in results):
            body += [f"<h2>Example outputs, {split}</h2>", *_examples(results, split)]
    body += ["<h2>Settings</h2>", "<h3>Recipe</h3>", f"<pre>{escape(recipe.text)}</pre>"]
    steps = {result["id"]: {"steps": result["steps"], "evaluate": result["settings"], "score": result["scored_with"]} for result in results}
    body += ["<h3>Rows as they were run</h3>", f"<pre>{escape(json.dumps(steps, indent=1))}</pre>"]
    body += ["<h3>Machine and versions</h3>", f"<pre>{escape(json.dumps(environment, indent=1))}</pre>"]
    head = f"<meta charset='utf-8'><title>Study {escape(recipe.name)}</title><style>{_STYLE}</style>"
    return f"<!doctype html>\n<html lang='en'><head>{head}</head><body>\n" + "\n".join(body) + "\n</body></html>\n"


def _table(columns: Sequence[Column], lines: Sequence[Mapping[str, Any]]) -> str:
    def cells(tag: str, texts: Sequence[str]) -> str:
        marked = zip(columns, texts, strict=True)
        return "".join(f"<{tag}{' class=text' if column.text else ''}>{escape(text)}</{tag}>" for column, text in marked)

    head = cells("th", [column.heading for column in columns])
    rows = [f"<tr>{cells('td', [column.cell(line) for column in columns])}</tr>" for line in lines]
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def _plots(lines: Sequence[Mapping[str, Any]]) -> str:
    wanted = (
        ("speedup_batch_1", "decoding speed-up over the dense fine-tuned model, batch 1 (×)"),
        ("size_mb", "size of the weight files (MB)"),
    )
    try:
        drawn = [svg for x, label in wanted if (svg := quality_plot(lines, x, label)) is not None]
    except InputError as error:
        return f"<p class='note'>{escape(str(error))}</p>"
    return f"<div class='plots'>{''.join(drawn)}</div>" if drawn else "<p class='note'>No row has both quality and speed.</p>"


def _examples(results: Sequence[Mapping[str, Any]], split: str) -> list[str]:
    """One table per example: the text's start, the reference, and what every row made of it."""
    having = [result for result in results if split in result["splits"]]
    parts = []
    for number, first in enumerate(having[0]["splits"][split]["predictions"]):
        rows = [("text begins", first["source"]), ("reference", first["reference"])]
        for result in having:
            some = result["splits"][split]["predictions"]
            if number < len(some) and some[number]["id"] == first["id"]:
                rows.append((result["id"], some[number]["prediction"]))
        cells = "".join(f"<tr><td class='text'><b>{escape(name)}</b></td><td class='out'>{_text(text)}</td></tr>" for name, text in rows)
        parts.append(f"<h3>{escape(first['title'] or first['id'])}</h3><table class='examples'>{cells}</table>")
    return parts


def _text(text: str) -> str:
    return escape(text) if text.strip() else "<span class='blank'>blank</span>"

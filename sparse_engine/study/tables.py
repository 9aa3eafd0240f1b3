"""The study's tables as Markdown and CSV, from the flat lines of its rows."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["Column", "comparison_columns", "csv_text", "markdown", "study_columns"]

Line = Mapping[str, Any]


class Column:
    """A heading and how a line's cell is written."""

    def __init__(self, heading: str, cell: Callable[[Line], str], *, text: bool = False) -> None:
        self.heading, self.cell, self.text = heading, cell, text


def _number(value: Any, form: str) -> str:
    return "–" if value is None else format(value, form)


def _beside(name: str, form: str, *, interval: bool = False) -> Callable[[Line], str]:
    """Our value, its interval where there is one, and the published value in brackets where there is one."""

    def cell(line: Line) -> str:
        text = _number(line.get(name), form)
        if interval and line.get(f"{name}_low") is not None:
            text += f" ±{(line[f'{name}_high'] - line[f'{name}_low']) / 2:{form}}"
        published = line.get(f"{name}_published")
        return text if published is None else f"{text} [{published:{form}}]"

    return cell


def study_columns() -> list[Column]:
    """The columns of the study's Table 3, published values in square brackets."""
    return [
        Column("row", lambda line: str(line["id"]), text=True),
        Column("model", lambda line: str(line["model"]), text=True),
        Column("technique", lambda line: line["technique"], text=True),
        Column("pruning", lambda line: line["pruning"], text=True),
        Column("sparsity", lambda line: line["sparsity"], text=True),
        Column("val ROUGE-L", _beside("validation_rougeL", ".4f", interval=True)),
        Column("val BERTScore", _beside("validation_bertscore", ".4f", interval=True)),
        Column("test ROUGE-L", _beside("test_rougeL", ".4f", interval=True)),
        Column("test BERTScore", _beside("test_bertscore", ".4f", interval=True)),
        Column("time (s)", _beside("seconds", ",.2f")),
        Column("non-zero parameters", _beside("nonzero", ",.0f")),
        Column("size (MB)", _beside("size_mb", ",.2f")),
    ]


def comparison_columns(lines: Sequence[Line]) -> list[Column]:
    """What the published table lacked: realised speed, packed size, recovery, likelihood and coherence."""
    speeds = sorted({key for line in lines for key in line if key.startswith("speedup_batch_")}, key=lambda k: int(k.rpartition("_")[2]))
    columns = [Column("row", lambda line: str(line["id"]), text=True), Column("engine", lambda line: str(line["engine"]), text=True)]
    columns.append(Column("token loop", lambda line: str(line["loop"]).partition(",")[0], text=True))
    for name in speeds:
        batch = name.rpartition("_")[2]
        columns.append(Column(f"ms/token, batch {batch}", _beside(f"token_ms_batch_{batch}", ".3f")))
        columns.append(Column(f"speed-up over dense, batch {batch}", _times(name)))
    columns += [
        Column("size over dense", _times("size_ratio")),
        Column("ROUGE-L of dense", _percent("rougeL_recovery")),
        Column("log-likelihood of dense", _percent("likelihood_recovery")),
        Column("answer perplexity, val", _beside("validation_answer_ppl", ".3f")),
        Column("answer perplexity, test", _beside("test_answer_ppl", ".3f")),
        Column("blank", _beside("test_blank", ".3f")),
        Column("repeated 4-grams", _beside("test_repeated_4grams", ".3f")),
        Column("novel 2-grams", _beside("test_novel_2grams", ".3f")),
        Column("coverage", _beside("test_coverage", ".3f")),
        Column("density", _beside("test_density", ".2f")),
        Column("length ratio", _beside("test_length_ratio", ".2f")),
        Column("peak GPU (MB)", _beside("peak_device_mb", ",.0f")),
        Column("peak host (MB)", _beside("peak_host_mb", ",.0f")),
        Column("held-out loss", _beside("heldout_loss", ".4f")),
        Column("training (s)", _beside("train_seconds", ",.0f")),
    ]
    return columns


def _times(name: str) -> Callable[[Line], str]:
    return lambda line: "–" if line.get(name) is None else f"{line[name]:.2f}×"


def _percent(name: str) -> Callable[[Line], str]:
    def cell(line: Line) -> str:
        if line.get(name) is None:
            return "–"
        return f"{line[name]:.1%} ({line[f'{name}_low']:.1%} to {line[f'{name}_high']:.1%})"

    return cell


def markdown(columns: Sequence[Column], lines: Sequence[Line]) -> str:
    """A table in Markdown, numbers to the right."""
    rows = [
        "| " + " | ".join(column.heading for column in columns) + " |",
        "|" + "|".join(" --- " if column.text else " ---: " for column in columns) + "|",
    ]
    rows += ["| " + " | ".join(column.cell(line) for column in columns) + " |" for line in lines]
    return "\n".join(rows) + "\n"


def csv_text(lines: Sequence[Line]) -> str:
    """Every column of every line, by name."""
    names = list(dict.fromkeys(name for line in lines for name in line))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return stream.getvalue()

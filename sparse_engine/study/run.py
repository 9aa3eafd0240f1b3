"""Runs a recipe's rows, or some of them, and writes the report of all that are finished in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import typer

from sparse_engine.checkpoint.writer import read_json, write_json
from sparse_engine.errors import InputError, SparseEngineError
from sparse_engine.progress import Track, silent
from sparse_engine.study.graph import Graph
from sparse_engine.study.parallel import evaluate_apart, prepare, visible_gpus
from sparse_engine.study.recipe import Recipe, Row
from sparse_engine.study.report import write_report
from sparse_engine.study.rows import row_result
from sparse_engine.study.stages import Stages

__all__ = ["run_study"]


def run_study(
    recipe: Recipe,
    out: Path,
    *,
    rows: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
    processes: int = 1,
    jobs: int = 1,
    source: str = "",
    score: bool = True,
    score_only: bool = False,
    report_only: bool = False,
    command: str = "",
    track: Track = silent,
) -> list[Path]:
    """Bring ``rows`` (default: all) of a recipe to an end and write the report into ``out``; gives the report's files.

    ``out``/stages holds the cached stages and ``out``/rows one JSON per finished row. Rows made by several runs or on several
    machines are merged by putting their files into the same folders. A row builds what it needs of other rows.

    Args:
        processes: GPUs that each fine-tuning is launched on by accelerate.
        jobs: pruning and training stages at a time, over all GPUs where there are several; what is measured runs alone on its GPU.
            Above 1 it needs ``source``.
        source: the recipe as it was named to :func:`~sparse_engine.study.recipe.load_recipe`.
        score: False leaves the scoring to another run, which finds the predictions in ``out``/stages.
        score_only: score the evaluations that are in ``out``/stages, whatever device made them, and run no model.
        report_only: run nothing, write the report of the rows that are there.

    Raises:
        InputError: the recipe has no such row, or no row is finished.
        SparseEngineError: a stage failed; the rows that do not need it are finished by then.
    """
    chosen = list(recipe.rows) if rows is None else list(rows)
    if unknown := [name for name in chosen if name not in recipe.rows]:
        raise InputError(f"the recipe has no row {unknown[0]!r}: it has {', '.join(recipe.rows)}")
    if jobs > 1 and processes > 1:
        raise InputError(f"{jobs} jobs share one device and {processes} processes spread one job over several: use one of the two")
    place = torch.device(device)
    finished = out / "rows"
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; choose another --out")
    if score_only:
        for name in chosen:
            _score_found(recipe, recipe.rows[name], out, track)
    elif not report_only:
        graph = Graph(recipe, place.type)
        stages = Stages(graph, out / "stages", place, processes, track)
        failed = dict[str, str]()
        if jobs > 1:
            failed = prepare(graph, stages, [recipe.rows[name] for name in chosen], source, jobs)
            chosen = [name for name in chosen if stages.made(graph.checkpoint(recipe.rows[name]))]
            if len(gpus := visible_gpus(place)) > 1:
                evaluate_apart(stages, [name for name in chosen if not stages.has(graph.evaluation(recipe.rows[name]))], source, gpus)
        for number, name in enumerate(chosen, 1):
            row = recipe.rows[name]
            typer.echo(f"row {number} of {len(chosen)}: {name}", err=True)
            if not score:
                stages.ensure(graph.evaluation(row))
                continue
            stages.ensure(graph.scores(row))
            finished.mkdir(parents=True, exist_ok=True)
            write_json(finished / f"{name}.json", row_result(row, graph, stages, examples=recipe.examples))
        if failed:
            raise SparseEngineError("; ".join(failed.values()))
    results: dict[str, Any] = {file.stem: read_json(file) for file in sorted(finished.glob("*.json")) if file.stem in recipe.rows}
    if not score and not results:
        return []
    return write_report(recipe, results, out, command)


def _score_found(recipe: Recipe, row: Row, out: Path, track: Track) -> None:
    for device in ("cuda", "cpu"):
        graph = Graph(recipe, device)
        stages = Stages(graph, out / "stages", torch.device("cpu"), 1, track)
        if stages.has(graph.evaluation(row)):
            stages.ensure(graph.scores(row))
            (out / "rows").mkdir(exist_ok=True)
            write_json(out / "rows" / f"{row.id}.json", row_result(row, graph, stages, examples=recipe.examples))
            return

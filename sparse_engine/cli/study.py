"""``sparse-engine study``: a whole table of models from one recipe, cached, resumable, with its report."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from sparse_engine.cli.app import app
from sparse_engine.cli.common import parse_device
from sparse_engine.errors import InputError
from sparse_engine.hf.loading import quiet_transformers
from sparse_engine.progress import console_track


@app.command(epilog="Example: sparse-engine study smoke --out study-smoke")
def study(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A .yaml file, or a shipped recipe: opt-125m-350m, offline-28m, smoke.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Stages, rows and report; default: study-NAME.")] = None,
    rows: Annotated[
        str | None, typer.Option("--rows", metavar="ID,ID", help="Run these rows alone; the report has all that are done.")
    ] = None,
    processes: Annotated[int, typer.Option("--processes", min=1, help="GPUs that fine-tuning is launched on by accelerate.")] = 1,
    jobs: Annotated[
        int,
        typer.Option(
            "--jobs", min=1, help="Pruning and training stages at a time, over all visible GPUs; what is measured runs alone on its GPU."
        ),
    ] = 1,
    no_score: Annotated[bool, typer.Option("--no-score", help="Leave scoring to a later run, here or where the libraries are.")] = False,
    score_only: Annotated[
        bool, typer.Option("--score-only", help="Run no model; score the evaluations that are there, whatever device made them.")
    ] = False,
    report_only: Annotated[bool, typer.Option("--report", help="Run nothing; write the report of the rows that are there.")] = False,
    list_rows: Annotated[bool, typer.Option("--list", help="Print the recipe's rows and stop.")] = False,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:N.")] = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Run a recipe's rows (prune, fine-tune, merge, generate, score) and write its tables, plots and example outputs.

    Every stage is kept by what it depends on: an interrupted study goes on where it was, and rows run elsewhere merge with these.
    """
    place = parse_device(device)

    from sparse_engine.study.recipe import load_recipe
    from sparse_engine.study.run import run_study

    found = load_recipe(recipe)
    if list_rows:
        for row in found.rows.values():
            steps = ", ".join(step.kind for step in row.steps) or "as it is"
            typer.echo(f"{row.id}: {row.model}{f' from {row.start}' if row.start else ''}, {steps}")
        return
    chosen = None if rows is None else [name.strip() for name in rows.split(",") if name.strip()]
    if chosen == []:
        raise InputError("--rows is empty; leave it out for all rows")
    if sum((no_score, score_only, report_only)) > 1:
        raise InputError("--no-score, --score-only and --report exclude each other")
    quiet_transformers()
    files = run_study(
        found,
        out or Path(f"study-{found.name}"),
        rows=chosen,
        device=place,
        processes=processes,
        jobs=jobs,
        source=recipe,
        score=not no_score,
        score_only=score_only,
        report_only=report_only,
        command=_command(recipe, device, jobs),
        track=console_track,
    )
    for file in files:
        typer.echo(str(file))


def _command(recipe: str, device: str, jobs: int) -> str:
    name = Path(recipe).name if Path(recipe).is_file() else recipe
    several = ["--jobs", str(jobs)] if jobs > 1 else []
    return (
        shlex.join(["sparse-engine", "study", name, "--device", device, *several]) if "study" in sys.argv else f"sparse-engine study {name}"
    )

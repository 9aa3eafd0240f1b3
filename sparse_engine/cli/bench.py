"""``sparse-engine bench``: the latency suite on this machine, as JSON, a table and a plot."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from sparse_engine.cli.app import app
from sparse_engine.cli.common import Backend, Regime, parse_device, parse_rows, regime_rows, split_list
from sparse_engine.errors import InputError
from sparse_engine.progress import console_track


def _shape(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,6})x([1-9]\d{0,6})", text)
    if match is None:
        raise InputError(f"cannot read --shape {text!r}: give output and input features such as 768x3072")
    return int(match[1]), int(match[2])


def _line(row: dict[str, Any]) -> str:
    name = f"{row['model']:9} {row['layer']:4} M {row['m']:4} {row['pattern']:12} {row['values']} {row['kernel']:18}"
    speed = f"{row['us']:10.2f} µs {row['dense_us'] / row['us']:5.2f}x dense {row['best_dense_us'] / row['us']:5.2f}x best"
    return f"{name} {speed}" + (f" {row['limit_share']:4.0%} of limit" if row["limit_share"] is not None else "")


@app.command(epilog="Example: sparse-engine bench --models opt-125m,opt-6.7b --rows 1,16")
def bench(
    models: Annotated[list[str] | None, typer.Option("--models", metavar="MODEL", help="OPT models; default: all.")] = None,
    layers: Annotated[list[str] | None, typer.Option("--layers", metavar="LAYER", help="out, qkv, fc1 or fc2.")] = None,
    shape: Annotated[list[str] | None, typer.Option("--shape", metavar="NxK", help="A layer of this size instead.")] = None,
    regime: Regime = "decode",
    rows: Annotated[list[str] | None, typer.Option("--rows", metavar="M", help="Activation rows in the place of the regime's.")] = None,
    patterns: Annotated[list[str] | None, typer.Option("--patterns", metavar="PATTERN", help="2:4, 4:8 or unstructured.")] = None,
    dtypes: Annotated[list[str] | None, typer.Option("--dtypes", metavar="TYPE", help="bf16, fp16, fp32, int8, fp8 or int4.")] = None,
    backend: Backend = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:N.")] = "cuda" if torch.cuda.is_available() else "cpu",
    threads: Annotated[int | None, typer.Option("--threads", help="Threads on a CPU; default: torch's.")] = None,
    seconds: Annotated[float, typer.Option("--seconds", help="Time per row of the table on a CPU.")] = 0.5,
    budget: Annotated[
        float | None, typer.Option("--budget", metavar="SECONDS", help="Time for the whole run on a GPU; default: 11 rounds a row.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where the files go; default: bench/results/ and the device's name.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run of the same commit and machine.")] = False,
) -> None:
    """Time packed linear layers against every dense product at hand, and against only reading their bytes.

    Writes linear-decode.json, .md and .svg, or linear-prefill where no product has fewer than 256 rows (on a CPU 128). Weights come from
    memory in every product; all of a row's products take turns. An option that names several things takes them with commas, or is repeated.
    """
    place = parse_device(device)

    from sparse_engine import registry
    from sparse_engine.bench import report, run
    from sparse_engine.bench.environment import device_name, microarchitecture
    from sparse_engine.bench.suite import Suite

    if backend is not None:
        registry.get(backend)
    named = {"models": models, "layers": layers, "patterns": patterns, "dtypes": dtypes}
    chosen: dict[str, Any] = {name: split_list(given) for name, given in named.items()} | {"rows": parse_rows(rows) or regime_rows(regime)}
    for option, value in (("--seconds", seconds), ("--budget", budget)):
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"{option} must be a number above 0, not {value}")
    suite = Suite(
        **{name: tuple(given) for name, given in chosen.items() if given},
        shapes=tuple(_shape(text) for text in split_list(shape)),
        backend=backend,
        seconds=seconds,
        budget=budget,
    )
    if threads is not None:
        if threads < 1:
            raise InputError(f"--threads must be 1 or more, not {threads}")
        torch.set_num_threads(threads)
    folder = out or Path("bench/results") / (device_name() if place.type == "cuda" else f"cpu-{microarchitecture()}")
    if any(part.is_file() for part in (folder, *folder.parents)):
        raise InputError(f"--out {folder} is or lies in a file; give a directory")
    path = folder / f"{run.name_of(suite, place)}.json"
    content = run.run(
        suite,
        place,
        path,
        resume=resume,
        track=console_track,
        report=lambda row: typer.echo(_line(row)),
        note=lambda text: typer.echo(text, err=True),
    )
    path.with_suffix(".md").write_text(report.linear_tables(content), encoding="utf-8")
    typer.echo(report.linear_tables(content))
    try:
        report.plot(content, path.with_suffix(".svg"))
    except ImportError:
        typer.echo("no plot was made: it needs matplotlib (pip install matplotlib)", err=True)
    if warning := content["environment"].get("warning"):
        typer.echo(f"note: {warning}", err=True)
    typer.echo(f"{len(content['rows'])} rows in {path}")

"""``sparse-engine inspect``: what a checkpoint holds, what each layer costs, and which kernel would run it here."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from sparse_engine.cli.app import app
from sparse_engine.cli.common import parse_device, size_text
from sparse_engine.errors import InputError
from sparse_engine.progress import console_track
from sparse_engine.value_types import PLAIN

if TYPE_CHECKING:
    from sparse_engine.checkpoint import Checkpoint
    from sparse_engine.plan import Step
    from sparse_engine.registry import Problem, Verdict

_ROWS = (1, 16, 128, 512, 4096)
"""Activation rows at which `--why` explains the choice."""


def _problem(checkpoint: Checkpoint, linear: str, device: torch.device) -> Problem:
    from sparse_engine.formats.base import PackedWeight
    from sparse_engine.registry import Problem

    layer = checkpoint.packed_layers[linear]
    described = PackedWeight(layer.format, 1, layer.pattern, layer.shape, layer.dtype, {}, layer.value_type)
    return Problem.of(described, 1, device)


def _layers(checkpoint: Checkpoint, device: torch.device) -> Iterator[dict[str, Any]]:
    from sparse_engine import plan

    stored: dict[str, int] = {}
    for name in checkpoint.names():
        linear, _, part = name.rpartition(".")
        if part != "bias":
            shape, dtype = checkpoint.spec(name)
            stored[linear] = stored.get(linear, 0) + torch.Size(shape).numel() * dtype.itemsize
    for linear in checkpoint.family.linears(checkpoint.config):
        rows, columns = checkpoint.linear_shape(linear)
        layer = checkpoint.packed_layers.get(linear)
        held: int | None = None
        buckets: dict[str, Any] = {}
        if layer is None:
            weight = checkpoint.weight(linear)
            density = int(weight.count_nonzero()) / weight.numel()
            dtype = weight.dtype
        else:
            problem, steps = _plan(checkpoint, linear, device)
            dtype, density = layer.dtype, layer.density
            buckets = {str(step.rows): _choice(step) for step in steps}
            held = stored[linear]
            if not all(step.kernel.in_place for step in steps):
                held = plan.held_nbytes(problem, steps, checkpoint.packed(linear))
        yield {
            "layer": linear,
            "shape": [rows, columns],
            "dtype": str(dtype).removeprefix("torch."),
            "values": layer.value_type if layer and layer.value_type != PLAIN else str(dtype).removeprefix("torch."),
            "pattern": str(layer.pattern) if layer else None,
            "density": density,
            "stored_nbytes": stored[linear],
            "dense_nbytes": rows * columns * dtype.itemsize,
            "held_nbytes": held,
            "buckets": buckets,
        }


def _plan(checkpoint: Checkpoint, linear: str, device: torch.device) -> tuple[Problem, list[Step]]:
    from sparse_engine.plan import kernels_for
    from sparse_engine.policy import Policy

    problem = _problem(checkpoint, linear, device)
    return problem, kernels_for(problem, None, Policy.here(device))


def _choice(step: Step) -> dict[str, Any]:
    from sparse_engine.registry import ESTIMATE

    source, config = step.verdict.source, step.verdict.config
    form = config[0] if config and isinstance(config[0], str) else None
    return {"kernel": step.kernel.name, "form": form, "us": step.verdict.cost if source != ESTIMATE else None, "source": source}


def _compact(buckets: dict[str, dict[str, Any]]) -> str:
    """Which kernel, in which form, runs how many rows, and its measured times: "cuda_nm decode_nm.cu to M = 16 (1.39 … 7.36 µs, …)"."""
    parts = []
    runs = [list(group) for _, group in groupby(buckets.items(), key=lambda item: [item[1][key] for key in ("kernel", "form", "source")])]
    for run in runs:
        times = [choice["us"] for _, choice in run if choice["us"] is not None]
        span = dict.fromkeys(f"{us:.2f}" for us in ((times[0], times[-1]) if times else ()))
        first = run[0][1]
        kernel, source = first["kernel"] if first["form"] is None else f"{first['kernel']} {first['form']}", first["source"]
        where = "" if len(runs) == 1 else f" to M = {run[-1][0]}" if run is not runs[-1] else " beyond"
        parts.append(f"{kernel}{where} ({' … '.join(span)} µs, {source})" if times else f"{kernel}{where} ({source})")
    return ", ".join(parts)


def _print_table(layers: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    # Off a terminal the width is a guess, and a table cut to it would lose the figures.
    console = Console() if sys.stdout.isatty() else Console(width=240)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("layer", "shape", "type", "pattern"):
        table.add_column(heading, no_wrap=heading != "shape")
    for heading in ("density", "stored", "dense", "share", "held"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("kernels (M: activation rows)")
    for row in layers:
        table.add_row(
            row["layer"].removeprefix("model.decoder.layers."),
            " x ".join(map(str, row["shape"])),
            row["dtype"] if row["values"] == row["dtype"] else f"{row['values']} for {row['dtype']}",
            row["pattern"] or "dense",
            f"{row['density']:.4f}",
            size_text(row["stored_nbytes"]),
            size_text(row["dense_nbytes"]),
            f"{row['stored_nbytes'] / row['dense_nbytes']:.1%}",
            "–" if row["held_nbytes"] is None else f"{row['held_nbytes'] / row['stored_nbytes'] - 1:+.1%}",
            _compact(row["buckets"]) or "torch",
        )
    console.print(table)


def _why(checkpoint: Checkpoint, linear: str, device: torch.device) -> dict[str, list[dict[str, Any]]]:
    from sparse_engine import registry
    from sparse_engine.policy import Policy

    matches = [name for name in checkpoint.packed_layers if name == linear or name.endswith(f".{linear}")]
    if len(matches) != 1:
        example = next(iter(checkpoint.packed_layers), None)
        hint = f"name one packed layer, such as {example}" if example else "the checkpoint has no packed layers"
        raise InputError(f"--why {linear} matches {len(matches)} packed layers: {hint}")
    problem, steps = _plan(checkpoint, matches[0], device)
    found = {}
    for count in _ROWS:
        # A kernel that is nearly as fast and serves other numbers of rows too goes before the fastest.
        kernel = next(step.kernel.name for step in steps if count <= step.rows)
        verdicts = registry.explain(problem.with_rows(count), Policy.here(device))
        found[str(count)] = [_verdict(v, chosen=v.kernel == kernel) for v in verdicts]
    return found


def _verdict(v: Verdict, *, chosen: bool) -> dict[str, Any]:
    return {"kernel": v.kernel, "chosen": chosen, "cost_us": v.cost, "reason": v.reason, "source": v.source, "config": list(v.config)}


def _why_line(v: dict[str, Any]) -> str:
    from sparse_engine.registry import ESTIMATE

    time = None if v["cost_us"] is None else f"{v['cost_us']:.2f} µs"
    if time is not None and v["source"] != ESTIMATE:
        time = f"{time} ({v['source']}{'' if not v['config'] else ', ' + ' '.join(map(str, v['config']))})"
    elif time is not None:
        time = f"estimated {time}"
    if v["reason"] is None:
        return f"{v['kernel']}: {'chosen' if v['chosen'] else 'able'}, {time}"
    measured = f"; {time}" if time is not None and v["source"] != ESTIMATE else ""
    return f"{v['kernel']}: rejected: {v['reason']}{measured}"


def _tables(device: torch.device) -> list[str]:
    """The tuning tables that times are from."""
    from sparse_engine import tuning

    if device.type != "cuda":
        return []
    gpu = torch.cuda.get_device_name(device)
    named = ((tuning.SHIPPED, tuning.shipped_path(gpu)), (tuning.USER, tuning.user_path(gpu)))
    return [f"{name}: {path if path.is_file() else 'none'}" for name, path in named]


@app.command(epilog="Example: sparse-engine inspect opt-125m-2of4 --verify --why layers.0.fc1")
def inspect(
    ckpt: Annotated[str, typer.Argument(metavar="DIR", help="Checkpoint directory or Hub id.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every packed linear against the sha256 recorded when it was written.")
    ] = False,
    why: Annotated[str | None, typer.Option("--why", metavar="LAYER", help="Why each kernel is chosen or not for this layer.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    device: Annotated[str, typer.Option("--device", help="Device whose kernels are asked.")] = "cuda"
    if torch.cuda.is_available()
    else "cpu",
) -> None:
    """Show each layer's pattern, density and size, the kernels that would run it, and what their layouts add to its bytes (held).

    Kernels are chosen by times measured on this GPU (`sparse-engine tune`, or a table that is shipped), else by an estimate.
    """
    place = parse_device(device)

    from sparse_engine.checkpoint import Checkpoint, resolve
    from sparse_engine.convert.pipeline import verify as run_verify

    checkpoint = Checkpoint(resolve(ckpt))
    reasons = {} if why is None else _why(checkpoint, why, place)
    layers = list(_layers(checkpoint, place))
    if verify:
        run_verify(checkpoint, track=console_track)
    stored, dense = (sum(row[key] for row in layers) for key in ("stored_nbytes", "dense_nbytes"))
    manifest = checkpoint.manifest or {}
    if as_json:
        provenance = {key: value for key, value in manifest.items() if key != "layers"}
        report = {
            "kind": checkpoint.kind,
            "file_nbytes": checkpoint.nbytes,
            "stored_nbytes": stored,
            "dense_nbytes": dense,
            "verified": verify,
            "tuning_tables": _tables(place),
            "manifest": provenance,
            "layers": layers,
            "why": reasons,
        }
        typer.echo(json.dumps(report, indent=2))
        return
    _print_table(layers)
    typer.echo(
        f"{checkpoint.kind}: {len(layers)} linears take {size_text(stored)} ({size_text(dense)} dense, {stored / dense:.1%}); "
        f"weight files {size_text(checkpoint.nbytes)}"
    )
    for count, verdicts in reasons.items():
        typer.echo(f"kernels for {why} at M = {count}:")
        for v in verdicts:
            typer.echo(f"  {_why_line(v)}")
    for line in _tables(place):
        typer.echo(line)
    if verify:
        typer.echo(f"verified: {len(manifest['layers'])} linears unpack to the bytes that were written")

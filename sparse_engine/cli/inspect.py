"""``sparse-engine inspect``: what a checkpoint holds, what each layer costs, and which kernel would run it here."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from sparse_engine.cli.app import app
from sparse_engine.cli.common import parse_device, size_text
from sparse_engine.errors import InputError
from sparse_engine.progress import console_track

if TYPE_CHECKING:
    from sparse_engine.checkpoint import Checkpoint
    from sparse_engine.registry import Problem

_ROWS = (1, 512)


def _problem(checkpoint: Checkpoint, linear: str, device: torch.device) -> Problem:
    from sparse_engine.formats.base import PackedWeight
    from sparse_engine.registry import Problem

    layer = checkpoint.packed_layers[linear]
    described = PackedWeight(layer.format, 1, layer.pattern, layer.shape, layer.dtype, {})
    return Problem.of(described, 1, device)


def _layers(checkpoint: Checkpoint, device: torch.device) -> Iterator[dict[str, Any]]:
    from sparse_engine import registry

    stored: dict[str, int] = {}
    for name in checkpoint.names():
        linear, _, part = name.rpartition(".")
        if part != "bias":
            shape, dtype = checkpoint.spec(name)
            stored[linear] = stored.get(linear, 0) + torch.Size(shape).numel() * dtype.itemsize
    for linear in checkpoint.family.linears(checkpoint.config):
        rows, columns = checkpoint.linear_shape(linear)
        layer = checkpoint.packed_layers.get(linear)
        if layer is None:
            weight = checkpoint.weight(linear)
            density = int(weight.count_nonzero()) / weight.numel()
            dtype, backends = weight.dtype, {}
        else:
            problem = _problem(checkpoint, linear, device)
            dtype, density = layer.dtype, layer.density
            backends = {str(count): registry.select(problem.with_rows(count)).name for count in _ROWS}
        yield {
            "layer": linear,
            "shape": [rows, columns],
            "dtype": str(dtype).removeprefix("torch."),
            "pattern": str(layer.pattern) if layer else None,
            "density": density,
            "stored_nbytes": stored[linear],
            "dense_nbytes": rows * columns * dtype.itemsize,
            "backends": backends,
        }


def _print_table(layers: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    # Off a terminal the width is a guess, and a table cut to it would lose the figures.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("layer", "shape", "type", "pattern"):
        table.add_column(heading, no_wrap=heading != "shape")
    for heading in ("density", "stored", "dense", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    for count in _ROWS:
        table.add_column(f"M = {count}")
    for row in layers:
        table.add_row(
            row["layer"].removeprefix("model.decoder.layers."),
            " x ".join(map(str, row["shape"])),
            row["dtype"],
            row["pattern"] or "dense",
            f"{row['density']:.4f}",
            size_text(row["stored_nbytes"]),
            size_text(row["dense_nbytes"]),
            f"{row['stored_nbytes'] / row['dense_nbytes']:.1%}",
            *(row["backends"].get(str(count), "torch") for count in _ROWS),
        )
    console.print(table)


def _why(checkpoint: Checkpoint, linear: str, device: torch.device) -> dict[str, list[dict[str, Any]]]:
    from sparse_engine import registry

    matches = [name for name in checkpoint.packed_layers if name == linear or name.endswith(f".{linear}")]
    if len(matches) != 1:
        example = next(iter(checkpoint.packed_layers), None)
        hint = f"name one packed layer, such as {example}" if example else "the checkpoint has no packed layers"
        raise InputError(f"--why {linear} matches {len(matches)} packed layers: {hint}")
    problem = _problem(checkpoint, matches[0], device)
    found = {}
    for count in _ROWS:
        verdicts = registry.explain(problem.with_rows(count))
        found[str(count)] = [{"kernel": v.kernel, "chosen": v.chosen, "cost_us": v.cost, "reason": v.reason} for v in verdicts]
    return found


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
    """Show each layer's pattern, density and size, and the kernel that would run it at M = 1 and M = 512 activation rows."""
    place = parse_device(device)

    from sparse_engine.checkpoint import Checkpoint, resolve
    from sparse_engine.convert.pipeline import verify as run_verify

    checkpoint = Checkpoint(resolve(ckpt))
    reasons = _why(checkpoint, why, place) if why else {}
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
            state = f"rejected: {v['reason']}" if v["reason"] else f"{'chosen' if v['chosen'] else 'able'}, estimated {v['cost_us']:.1f} µs"
            typer.echo(f"  {v['kernel']}: {state}")
    if verify:
        typer.echo(f"verified: {len(manifest['layers'])} linears unpack to the bytes that were written")

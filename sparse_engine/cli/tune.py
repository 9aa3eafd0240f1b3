"""``sparse-engine tune``: measure the kernels of this GPU once, so that every later choice follows measured times."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer

from sparse_engine.cli.app import app
from sparse_engine.cli.common import Regime, parse_device, parse_rows, regime_rows, split_list
from sparse_engine.errors import InputError, KernelUnavailableError
from sparse_engine.hf.loading import parse_dtype
from sparse_engine.progress import console_track
from sparse_engine.value_types import PLAIN, all_value_types

if TYPE_CHECKING:
    from sparse_engine.bench.tune import Bucket
    from sparse_engine.pattern import SparsityPattern
    from sparse_engine.tuning import Measured


def _wanted(ckpt: str | None, models: list[str], patterns: list[str], dtype: str | None, rows: list[int]) -> list[Bucket]:
    from sparse_engine.bench.shapes import HIDDEN, LAYERS, PATTERNS, shape_of
    from sparse_engine.bench.tune import buckets
    from sparse_engine.pattern import SparsityPattern

    def parsed(texts: list[str]) -> list[SparsityPattern]:
        return [SparsityPattern.parse(PATTERNS.get(text, text)) for text in texts]

    if ckpt is not None and models:
        raise InputError("give a checkpoint or --models, not both")
    given, value_type = _parse_values(dtype)
    if ckpt is None:
        unknown = [model for model in models if model not in HIDDEN]
        if unknown:
            raise InputError(f"unknown --models {unknown[0]}: use {', '.join(HIDDEN)}")
        shapes = [shape_of(model, layer) for model in models or HIDDEN for layer in LAYERS]
        return buckets(shapes, parsed(patterns or list(PATTERNS)), [given or torch.bfloat16], rows, value_type or PLAIN)

    from sparse_engine.checkpoint import Checkpoint, resolve

    checkpoint = Checkpoint(resolve(ckpt))
    linears = checkpoint.family.linears(checkpoint.config)
    if checkpoint.packed_layers:
        if patterns:
            raise InputError(f"{ckpt} is packed and has its own patterns; --patterns is for dense checkpoints and --models")
        layers = checkpoint.packed_layers.values()
        found = [
            b
            for layer in layers
            for b in buckets([layer.shape], [layer.pattern], [given or layer.dtype], rows, value_type or layer.value_type)
        ]
        # Unstructured layers differ in density by a little; one of a kind stands for all.
        unique = {(b.pattern if b.pattern.is_nm else None, b.dtype, b.shape, b.rows, b.value_type): b for b in found}
        return sorted(unique.values(), key=lambda b: (b.shape[0] * b.shape[1], b.shape, str(b.pattern), b.rows))
    if not patterns:
        raise InputError(f"{ckpt} is dense; say what it will be packed as, such as --patterns 2:4")
    shapes = [checkpoint.linear_shape(linear) for linear in linears]
    return buckets(shapes, parsed(patterns), [given or checkpoint.spec(f"{linears[0]}.weight")[1]], rows, value_type or PLAIN)


def _parse_values(text: str | None) -> tuple[torch.dtype | None, str | None]:
    """The type of activations and of plain weights, and that of quantised values, each None where ``--dtype`` leaves it open."""
    if text in all_value_types() and text != PLAIN:
        return torch.bfloat16, text
    return parse_dtype(text), None


def _line(bucket: Bucket, measured: dict[str, Measured]) -> str:
    times = sorted(measured.items(), key=lambda item: item[1].us)
    return f"{bucket}: " + (", ".join(f"{name} {m.us:.2f} µs" for name, m in times) or "no kernel runs it")


@app.command(epilog="Example: sparse-engine tune --models opt-125m,opt-1.3b --patterns 2:4")
def tune(
    ckpt: Annotated[str | None, typer.Argument(metavar="[CKPT]", help="Tune for this checkpoint's layers; default: OPT's.")] = None,
    models: Annotated[list[str] | None, typer.Option("--models", metavar="MODEL", help="OPT models, such as opt-125m.")] = None,
    patterns: Annotated[
        list[str] | None,
        typer.Option("--patterns", metavar="PATTERN", help="2:4, 4:8, unstructured or another."),
    ] = None,
    regime: Regime = "decode",
    rows: Annotated[list[str] | None, typer.Option("--rows", metavar="M", help="Activation rows in the place of the regime's.")] = None,
    kernels: Annotated[list[str] | None, typer.Option("--kernels", metavar="KERNEL", help="Measure these alone; default: all.")] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", metavar="TYPE", help="bf16, fp16 or fp32; int8 or fp8: quantised weights.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cuda or cuda:N.")] = "cuda:0",
    seconds: Annotated[float, typer.Option("--seconds", help="Time per product and number of rows for trying configurations.")] = 0.5,
    force: Annotated[bool, typer.Option("--force", help="Measure again what the table has already.")] = False,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write this table instead of your own in the cache.")] = None,
    compile_only: Annotated[bool, typer.Option("--compile-only", help="Only compile the kernels, into the cache.")] = False,
) -> None:
    """Measure every kernel that can run these layers on this GPU, and keep the times: kernels are chosen by them from then on.

    Each product is checked before it is timed. A run that was interrupted goes on where it stopped. An option that names several
    things takes them with commas, or is repeated.
    """
    from sparse_engine import registry, tuning
    from sparse_engine.bench import tune as work

    if not torch.cuda.is_available():
        raise KernelUnavailableError("tuning measures GPU kernels and needs a CUDA device, and torch sees none")
    place = parse_device(device)
    if place.type != "cuda":
        raise KernelUnavailableError("tuning measures GPU kernels: give --device cuda:0, not cpu")
    if not 0 < seconds < math.inf:
        raise InputError(f"--seconds must be a number above 0, not {seconds}")
    wanted = _wanted(ckpt, split_list(models), split_list(patterns), dtype, parse_rows(rows) or regime_rows(regime))
    only = frozenset(split_list(kernels))
    for name in only:
        registry.get(name)
    gpu = torch.cuda.get_device_name(place)
    path = out or tuning.user_path(gpu)
    left = wanted if force else work.pending(wanted, place, path, only)
    if len(left) < len(wanted):
        typer.echo(f"{len(wanted) - len(left)} of {len(wanted)} entries are in {path} already (--force measures them again)", err=True)
    if failures := work.compile_all(left, place, only, track=console_track):
        typer.echo(f"{len(failures)} kernels did not compile and are left out; the first: {failures[0]}", err=True)
    if compile_only:
        return
    torch.manual_seed(0)
    outcome = work.tune(
        left,
        place,
        path,
        only=only,
        seconds=seconds,
        track=console_track,
        report=lambda bucket, measured: typer.echo(_line(bucket, measured)),
    )
    typer.echo(f"{outcome.measured} entries measured on {gpu}, kept in {path}")
    if outcome.wrong:
        typer.echo(f"{len(outcome.wrong)} products were wrong and are left out:", err=True)
        for text in outcome.wrong:
            typer.echo(f"  {text}", err=True)
        raise typer.Exit(1)

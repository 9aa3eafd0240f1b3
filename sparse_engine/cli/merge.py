"""``sparse-engine merge``: an adapter and its base become one checkpoint, without losing a mask."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparse_engine.cli.app import app
from sparse_engine.cli.common import Dtype
from sparse_engine.hf.loading import parse_dtype, quiet_transformers


@app.command(epilog="Example: sparse-engine merge opt-125m-2of4-sparse-lora --out opt-125m-2of4-tuned")
def merge(
    adapter: Annotated[Path, typer.Argument(metavar="DIR", help="What `finetune --method qlora` or `sparse-lora` wrote.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where to write; default: DIR-merged.")] = None,
    base: Annotated[str | None, typer.Option("--base", metavar="CKPT", help="The adapter's base, if it was moved.")] = None,
    apply_mask: Annotated[
        bool, typer.Option("--apply-mask", help="Drop what an adapter trained without the mask would add to removed weights.")
    ] = False,
    form: Annotated[
        str, typer.Option("--format", metavar="FORM", help="packed, dense or compressed-tensors; of a pruned base.")
    ] = "packed",
    dtype: Dtype = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out.")] = False,
) -> None:
    """Add an adapter to the weights it was trained on. A merge that would lose the base's mask is refused."""
    stored = parse_dtype(dtype)
    quiet_transformers()

    from sparse_engine.train.merge import merge as run

    target = out or adapter.with_name(adapter.resolve().name + "-merged")
    report = run(adapter, target, base=base, apply_mask=apply_mask, output=form, dtype=stored, overwrite=overwrite)
    typer.echo(f"{report.merged_layers} linears merged, {report.masked_layers} of the model's linears under a mask")
    if report.dropped:
        typer.echo(f"dropped {report.dropped:.1%} of the update's norm, which lay outside the mask: check the quality of the result")
    typer.echo(f"written to {report.out}")

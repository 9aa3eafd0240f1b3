"""``sparse-engine convert``: prune and pack a checkpoint, or re-write a packed one in another form."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from sparse_engine.cli.app import app
from sparse_engine.cli.common import Device, Dtype, parse_device, seed_option, size_text
from sparse_engine.errors import InputError
from sparse_engine.hf.loading import load_tokenizer, parse_dtype, quiet_transformers
from sparse_engine.pattern import SparsityPattern
from sparse_engine.progress import console_track

_LONGEST = 2048


def _pattern(nm: str | None, sparsity: str | None) -> SparsityPattern | None:
    if nm is not None and sparsity is not None:
        raise InputError("--nm and --sparsity exclude each other: give --nm 2:4 for a pattern or --sparsity 0.5 for an unstructured share")
    if nm is not None:
        pattern = SparsityPattern.parse(nm)
        if not pattern.is_nm:
            raise InputError(f"--nm takes N:M such as 2:4, got {nm!r}; an unstructured share is --sparsity {nm}")
        return pattern
    if sparsity is not None:
        pattern = SparsityPattern.parse(sparsity)
        if pattern.is_nm:
            raise InputError(f"--sparsity takes a share such as 0.5, got {sparsity!r}; a pattern is --nm {sparsity}")
        return pattern
    return None


def _default_out(checkpoint: Path, name: str, pattern: SparsityPattern | None, values: str | None, form: str) -> Path:
    # A Hub id's last part names the model; the directory it was downloaded to is named by its commit.
    stem = checkpoint.resolve().name if Path(name).expanduser().is_dir() else name.rpartition("/")[2]
    made = [str(pattern).replace(":", "of") if pattern else None, values, None if form == "packed" else form]
    parts = [stem, *(part for part in made if part)]
    return Path("-".join(parts) if len(parts) > 1 else f"{stem}-packed")


@app.command(epilog="Example: sparse-engine convert facebook/opt-125m --nm 2:4 --calibration c4 --out opt-125m-2of4")
def convert(
    ckpt: Annotated[str, typer.Argument(metavar="CKPT", help="Checkpoint directory or Hub id; safetensors only.")],
    nm: Annotated[str | None, typer.Option("--nm", metavar="N:M", help="Keep N of every M weights, such as 2:4 or 4:8.")] = None,
    sparsity: Annotated[str | None, typer.Option("--sparsity", metavar="SHARE", help="Remove this share anywhere, such as 0.5.")] = None,
    pruner: Annotated[
        str | None,
        typer.Option(
            "--pruner", metavar="NAME", help="magnitude, wanda or sparsegpt; default: sparsegpt with --calibration, else magnitude."
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration", metavar="SOURCE", help="A .txt, .jsonl (also .gz, .zst) or .parquet file, or c4 or billsum from the Hub."
        ),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Calibration samples.")] = 128,
    length: Annotated[
        int | None, typer.Option("--length", min=2, help="Tokens per sample; default: the model's maximum, at most 2048.")
    ] = None,
    prompts: Annotated[
        bool, typer.Option("--prompts", help="Calibrate on the summarisation prompt of each row with its `summary`.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where to write; default: named after checkpoint and pattern.")
    ] = None,
    values: Annotated[
        str | None,
        typer.Option("--values", metavar="TYPE", help="Quantise the kept weights: int8, fp8 or int4; default: keep their type."),
    ] = None,
    lm_head: Annotated[
        str | None, typer.Option("--lm-head", metavar="TYPE", help="int8: decode on a processor with an int8 copy of the output head.")
    ] = None,
    form: Annotated[
        str, typer.Option("--format", metavar="FORM", help="packed, dense (masked, for any tool) or compressed-tensors.")
    ] = "packed",
    dtype: Dtype = None,
    device: Device = "cpu",
    seed: Annotated[int, seed_option("Of the choice of calibration samples.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from an interrupted run with the same settings.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing --out.")] = False,
) -> None:
    """Prune a checkpoint and write it packed. A packed one is re-written as --format, --dtype, --values and --lm-head say."""
    pattern = _pattern(nm, sparsity)
    stored, place = parse_dtype(dtype), parse_device(device)

    from sparse_engine import pruners, value_types
    from sparse_engine.checkpoint import Checkpoint, resolve, storage
    from sparse_engine.convert import convert as run
    from sparse_engine.data.calibration import calibration_tokens
    from sparse_engine.pruners.base import Needs

    quiet_transformers()
    storage.get(form)
    if values is not None:
        value_types.quantised(values)
    chosen = pruners.get(pruner or ("sparsegpt" if calibration else "magnitude"))
    path = resolve(ckpt)
    checkpoint = Checkpoint(path)
    needs_text = chosen.needs is not Needs.NOTHING
    if checkpoint.packed_layers and any(value is not None for value in (pattern, pruner, calibration)):
        raise InputError(
            f"{ckpt} is packed already: only --format, --dtype, --values and --lm-head apply; prune the dense one it came from"
        )
    if not checkpoint.packed_layers and pattern is None:
        raise InputError(f"{ckpt} is dense: give a pattern, --nm 2:4 or --sparsity 0.5")
    if calibration and not needs_text:
        raise InputError(f"--pruner {pruner} uses no calibration text: leave out --calibration, or choose wanda or sparsegpt")
    target = out or _default_out(path, ckpt, pattern, values, form)
    if target.exists() and not overwrite:
        raise InputError(f"{target} exists; choose another --out or pass --overwrite")
    provenance: dict[str, object] = {"source": ckpt}
    tokens = []
    if pattern is not None:
        for linear in checkpoint.family.linears(checkpoint.config):
            pattern.check_shape(checkpoint.linear_shape(linear), linear)
        if needs_text:
            source = calibration or "c4"
            count = length or min(checkpoint.family.max_length(checkpoint.config), _LONGEST)
            tokens = calibration_tokens(source, load_tokenizer(path), samples=samples, length=count, seed=seed, as_prompts=prompts)
            provenance["calibration"] = {"source": source, "samples": len(tokens), "length": count, "seed": seed, "prompts": prompts}
    report = run(
        path,
        target,
        pattern=pattern,
        pruner=chosen.name,
        calibration=tokens,
        device=place,
        dtype=stored,
        values=values,
        head=lm_head,
        output=form,
        resume=resume,
        overwrite=overwrite,
        provenance=provenance,
        track=console_track,
    )
    if pattern is not None and pruner is None and not needs_text:
        typer.echo("pruned by magnitude; --calibration FILE (or c4, billsum) would keep far more quality", err=True)
    sys.stderr.flush()
    share = report.packed_linear_nbytes / report.dense_linear_nbytes
    typer.echo(
        f"{len(report.layers)} linears: {size_text(report.dense_linear_nbytes)} dense, "
        f"{size_text(report.packed_linear_nbytes)} as written ({share:.1%})\n"
        f"weight files: {size_text(report.source_nbytes)} before, {size_text(report.out_nbytes)} after\n"
        f"took {report.seconds:.1f} s, peak memory {size_text(report.peak_rss_nbytes)}\n"
        f"written to {report.out}"
    )

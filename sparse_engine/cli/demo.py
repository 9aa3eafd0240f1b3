"""``sparse-engine demo``: the embedded summariser dense and packed, then one large layer, all measured here and now."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparse_engine.cli.app import app
from sparse_engine.cli.common import size_text
from sparse_engine.errors import InputError
from sparse_engine.hf.loading import quiet_transformers
from sparse_engine.progress import console_track

if TYPE_CHECKING:
    from rich.table import Table

    from sparse_engine.demo.compare import Comparison
    from sparse_engine.demo.layer import LayerTimes


@app.command(epilog="Example: sparse-engine demo --out summ-7m-2of4")
def demo(
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Keep the packed checkpoint here.")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all figures here as JSON.")] = None,
) -> None:
    """Prune and pack the summariser that ships with this package, and compare it with the dense one. Needs no network."""
    from rich.console import Console

    from sparse_engine.demo.compare import compare
    from sparse_engine.demo.embedded import PATTERN
    from sparse_engine.demo.layer import measure_layer

    for file in (out, as_json):
        if file is not None and not file.absolute().parent.is_dir():
            raise InputError(f"cannot write {file}: there is no directory {file.parent}")
    if out is not None and out.exists():
        raise InputError(f"{out} exists; choose another --out")
    if as_json is not None and as_json.is_dir():
        raise InputError(f"--json {as_json} is a directory; give a file")
    quiet_transformers()
    busy, cores = os.getloadavg()[0], os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as scratch:
        compared = compare(out or Path(scratch) / "packed", track=console_track)
    typer.echo("measuring one OPT-1.3b layer", err=True)
    layer = measure_layer(PATTERN)

    console = Console()
    console.print(_summariser_table(compared))
    typer.echo(
        f"{compared.same_summaries} of {compared.summaries} summaries are the same, token for token, as those of the pruned "
        "weights kept dense: what the summaries lose is pruning's doing, not packing's.\n"
        "Pruned by SparseGPT in "
        f"{compared.convert_seconds:.1f} s, calibrated on six example bills with the dense model's own summaries; the same six bills are "
        f"summarised. Kernel: {', '.join(compared.kernels)}; computed in fp32. Dense and packed run in this package's token loop; "
        f"transformers' own, on the pruned weights kept dense, makes {compared.transformers_per_second:.1f} tokens/s.\n\n"
        f"{compared.titles[0]}\n  dense:  {compared.dense.summaries[0]}\n  packed: {compared.packed.summaries[0]}\n\n"
        "A 7M model is too small to be bound by its weights, so here are the linears of one OPT-1.3b layer, one token at a time:\n"
    )
    console.print(_layer_table(layer))
    kernels = sorted(set(layer.kernels.values()))
    typer.echo(
        f"Medians of {layer.rounds} rounds over {layer.copies} copies of the layer, so that weights come from memory and not from cache. "
        f"Kernel: {', '.join(kernels)}."
    )
    if "reference" in kernels:
        typer.echo(
            "The reference kernel unpacks to dense at every call: no faster kernel runs on this machine (`sparse-engine inspect --why`)."
        )
    if busy > cores / 2:
        typer.echo(
            f"This machine was busy before the demo began (load average {busy:.1f} on {cores} cores), so times are not to be relied on."
        )
    if out is not None:
        typer.echo(f"packed checkpoint kept in {out}")
    if as_json is not None:
        figures = {"load_average_before": busy, "summariser": dataclasses.asdict(compared), "layer": dataclasses.asdict(layer)}
        as_json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _table(title: str, *headings: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("")
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _summariser_table(c: Comparison) -> Table:
    table = _table("embedded 7M summariser", "dense", "packed 2:4", "packed / dense")
    for label, name in (
        ("weight files", "file_nbytes"),
        ("weights in memory", "weight_nbytes"),
        ("  of these the pruned linears", "linear_nbytes"),
    ):
        dense, packed = getattr(c.dense, name), getattr(c.packed, name)
        table.add_row(label, size_text(dense), size_text(packed), f"{packed / dense:.1%}")
    speed, packed_speed = c.dense.tokens_per_second, c.packed.tokens_per_second
    table.add_row("tokens/s, decoding", f"{speed:.1f}", f"{packed_speed:.1f}", f"{packed_speed / speed:.2f}x")
    if c.dense.rouge_l is not None and c.packed.rouge_l is not None:
        table.add_row("ROUGE-L", f"{c.dense.rouge_l:.3f}", f"{c.packed.rouge_l:.3f}", f"{c.packed.rouge_l / c.dense.rouge_l:.2f}x")
    else:
        table.add_row("ROUGE-L", "not measured:", "pip install", "sparse-engine\\[eval]")
    return table


def _layer_table(t: LayerTimes) -> Table:
    table = _table("linears of one OPT-1.3b layer, M = 1", "weights", "time", "packed is faster by")
    forms = (("torch dense, bf16", t.dense_bf16_nbytes, t.dense_bf16_us), ("torch dense, fp32", 2 * t.dense_bf16_nbytes, t.dense_fp32_us))
    for label, nbytes, us in forms:
        table.add_row(label, size_text(nbytes), f"{us:,.0f} µs", f"{us / t.packed_us:.2f}x")
    table.add_row("packed 2:4, bf16", size_text(t.packed_nbytes), f"{t.packed_us:,.0f} µs", "")
    return table

"""``sparse-engine summarize``: summaries of bills from files."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from sparse_engine.cli.app import app
from sparse_engine.cli.common import Backend, Device, Dtype, parse_device
from sparse_engine.errors import InputError
from sparse_engine.hf.loading import load_model, load_tokenizer, parse_dtype, quiet_transformers
from sparse_engine.progress import console_track

_MOST = 256
"""Rows of one batch of the engine."""


def _batch(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or not 0 < int(text) <= _MOST:
        raise InputError(f"--batch {text}: use auto or a number from 1 to {_MOST}")
    return int(text)


@app.command(epilog="Example: sparse-engine summarize bill.txt more-bills.jsonl.gz --out summaries.jsonl")
def summarize(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help=".txt (one bill each), .jsonl (also .gz, .zst) or .parquet.")],
    model: Annotated[
        str | None, typer.Option("--model", metavar="CKPT", help="Summariser; default: the one that ships, packed 2:4.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write JSONL here; default: text to standard output.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens of a summary.")] = 128,
    batch: Annotated[
        str, typer.Option("--batch", metavar="auto|N", help="Bills at once; auto: as many as a GPU bears, at most 64, or 16 on a CPU.")
    ] = "auto",
    backend: Backend = None,
    dtype: Dtype = None,
    device: Device = "cpu",
) -> None:
    """Summarise bills with a model fine-tuned on the study's prompt."""
    stored, place, at_once = parse_dtype(dtype), parse_device(device), _batch(batch)

    from sparse_engine.data.files import read_documents
    from sparse_engine.engine.runner import runner_for
    from sparse_engine.evaluate.summarise import summarise, summarise_many

    rows = [{"file": str(file), **row} for file in files for row in read_documents(file)]
    if out is not None and not out.parent.is_dir():
        raise InputError(f"--out {out}: there is no directory {out.parent}")
    if out is not None and out.is_dir():
        raise InputError(f"--out {out} is a directory; give a file")
    quiet_transformers()
    with tempfile.TemporaryDirectory() as scratch:
        if model is None:
            from sparse_engine.demo.embedded import pack

            typer.echo("packing the embedded 7M summariser to 2:4; --model CKPT takes another", err=True)
            path = pack(Path(scratch) / "packed").out
        else:
            from sparse_engine.checkpoint import resolve

            path = resolve(model)
        tokenizer = load_tokenizer(path)
        loaded = load_model(path, backend=backend, dtype=stored, device=place)
        texts = [row["text"] for row in rows]
        started = time.perf_counter()
        if at_once is None and isinstance(runner_for(loaded), str):
            alone = summarise(loaded, tokenizer, texts, max_new_tokens=max_new_tokens, track=console_track)
            summaries = [(one.text, len(one.tokens)) for one in alone]
        else:
            summaries = summarise_many(loaded, tokenizer, texts, batch=at_once, max_new_tokens=max_new_tokens, track=console_track)
        seconds, tokens = time.perf_counter() - started, sum(count for _, count in summaries)
        typer.echo(f"{len(texts)} summaries, {tokens} tokens in {seconds:.2f} s ({tokens / seconds:.1f} tokens/s)", err=True)
    if out is not None:
        lines = []
        for row, (summary, _) in zip(rows, summaries, strict=True):
            known = {key: row[key] for key in ("file", "bill_id", "title") if isinstance(row.get(key), str)}
            lines.append(json.dumps({**known, "summary": summary}, ensure_ascii=False) + "\n")
        out.write_text("".join(lines), encoding="utf-8")
        typer.echo(f"{len(lines)} summaries written to {out}", err=True)
        return
    for row, (summary, _) in zip(rows, summaries, strict=True):
        if len(rows) > 1:
            typer.echo(f"== {row.get('title') or row.get('bill_id') or row['file']}")
        typer.echo(summary + ("\n" if len(rows) > 1 else ""))

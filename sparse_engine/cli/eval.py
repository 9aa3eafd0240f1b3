"""``sparse-engine eval`` and ``score``: summaries of held-out examples, what they cost, and how good they are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparse_engine.cli.app import app
from sparse_engine.cli.common import Backend, Device, Dtype, parse_device, seed_option, size_text
from sparse_engine.cli.data_options import SummaryColumn, TextColumn
from sparse_engine.errors import InputError
from sparse_engine.hf.loading import quiet_transformers
from sparse_engine.progress import console_track

Metrics = Annotated[
    str | None, typer.Option("--metrics", metavar="NAMES", help="Comma-separated: bertscore, coherence, extractive, rouge; default: all.")
]
BertModel = Annotated[
    str, typer.Option("--bertscore-model", metavar="MODEL", help="Encoder of BERTScore: a Hub name or a local directory.")
]
BertLayers = Annotated[int | None, typer.Option("--bertscore-layers", min=1, help="Layer of the encoder; needed for a local directory.")]


@app.command("eval", epilog="Example: sparse-engine eval opt-125m-2of4-tuned --data billsum --split test --out scores/opt-125m")
def evaluate(
    ckpt: Annotated[str, typer.Argument(metavar="CKPT", help="Checkpoint directory, Hub id, or adapter directory.")],
    data: Annotated[str, typer.Option("--data", metavar="SOURCE", help="billsum, or a .jsonl (also .gz, .zst) or .parquet file.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the predictions and scores; a stopped run there continues.")],
    split: Annotated[str, typer.Option("--split", help="Of billsum: validation (California) or test (US).")] = "test",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Use this many examples, by --seed.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Summaries generated together.")] = 8,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens of a summary.")] = 128,
    max_text_tokens: Annotated[
        int, typer.Option("--max-text-tokens", min=1, help="Most tokens of a document; what is longer is cut.")
    ] = 1024,
    metrics: Metrics = None,
    bertscore_model: BertModel = "roberta-large",
    bertscore_layers: BertLayers = None,
    perplexity: Annotated[
        str | None, typer.Option("--perplexity", metavar="TEXT", help="Also over windows of this text: wikitext2 or a file.")
    ] = None,
    no_score: Annotated[
        bool, typer.Option("--no-score", help="Generate only; `sparse-engine score DIR` scores, here or elsewhere.")
    ] = False,
    base: Annotated[str | None, typer.Option("--base", metavar="CKPT", help="An adapter's base, if it was moved.")] = None,
    text_column: TextColumn = "text",
    summary_column: SummaryColumn = "summary",
    seed: Annotated[int, seed_option("Of the choice of examples.")] = 0,
    backend: Backend = None,
    dtype: Dtype = None,
    device: Device = "cpu",
) -> None:
    """Summarise held-out examples in batches, measure time, memory and size, and score the summaries."""
    place = parse_device(device)

    from sparse_engine.checkpoint.writer import write_json
    from sparse_engine.data.pairs import load_pairs
    from sparse_engine.evaluate.run import EvaluateSettings, generate, load_for_evaluation, perplexity_text, text_perplexity

    settings = EvaluateSettings(
        batch_size=batch_size, max_new_tokens=max_new_tokens, max_text_tokens=max_text_tokens, dtype=dtype, backend=backend
    )
    _check_metrics(metrics)
    pairs = load_pairs(data, split, limit=limit, seed=seed, text_column=text_column, summary_column=summary_column)
    text = None if perplexity is None else perplexity_text(perplexity)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; give a directory")
    quiet_transformers()
    loaded = load_for_evaluation(ckpt, settings, place, base=base)
    made = generate(loaded, pairs, out, settings, track=console_track)
    _print_cost(made)
    if text is not None:
        value = text_perplexity(loaded, text, track=console_track)
        write_json(out / "perplexity.json", {"text": perplexity, "perplexity": value})
        typer.echo(f"perplexity of {perplexity}: {value:.3f}")
    if no_score:
        typer.echo(f"predictions in {out}; score them with `sparse-engine score {out}`")
        return
    _score(out, metrics, bertscore_model, bertscore_layers, device)


@app.command(epilog="Example: sparse-engine score scores/opt-125m --bertscore-model minilm/model --bertscore-layers 6")
def score(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that `eval` filled.")],
    metrics: Metrics = None,
    bertscore_model: BertModel = "roberta-large",
    bertscore_layers: BertLayers = None,
    device: Device = "cpu",
) -> None:
    """Score predictions that `eval --no-score` left, here or on another machine; needs no model but BERTScore's encoder."""
    parse_device(device)
    _check_metrics(metrics)
    quiet_transformers()
    _score(folder, metrics, bertscore_model, bertscore_layers, device)


def _check_metrics(metrics: str | None) -> None:
    from sparse_engine.evaluate.metrics import choose

    choose(_names(metrics))


def _names(metrics: str | None) -> list[str] | None:
    if metrics is None:
        return None
    if not (names := [name.strip() for name in metrics.split(",") if name.strip()]):
        raise InputError("--metrics is empty; leave it out for all metrics")
    return names


def _score(folder: Path, metrics: str | None, bertscore_model: str, bertscore_layers: int | None, device: str) -> None:
    from sparse_engine.evaluate.metrics.base import MetricSettings
    from sparse_engine.evaluate.run import score as run

    found = run(folder, _names(metrics), MetricSettings(bertscore_model, bertscore_layers, device))
    for name, interval in found["metrics"].items():
        typer.echo(f"{name:16} {interval['value']:8.4f}   95 % from {interval['low']:.4f} to {interval['high']:.4f}")
    typer.echo(f"written to {folder}")


def _print_cost(made: dict[str, Any]) -> None:
    device = made["peak_device_nbytes"]
    host = made["peak_host_nbytes"]
    peaks = [f"{name} {size_text(value)}" for name, value in (("device", device), ("host", host)) if value is not None]
    typer.echo(
        f"{made['examples']} summaries in {made['seconds']:.1f} s ({made['seconds_per_example']:.3f} s each, "
        f"{made['tokens_per_second']:.0f} tokens/s) on {made['device']}, {made['kind']}\n"
        f"answer perplexity {made['answer_ppl']:.3f}\n"
        f"{made['parameters']:,} parameters, {made['nonzero']:,} non-zero; weights {size_text(made['weight_nbytes'])} in memory, "
        f"{size_text(made['disk_nbytes'])} on disk; peak memory {', '.join(peaks)}"
    )

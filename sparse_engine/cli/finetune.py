"""``sparse-engine finetune``: train a checkpoint on pairs of a document and its summary, pruned weights staying pruned."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparse_engine.cli.app import app
from sparse_engine.cli.common import Device, Dtype, parse_device, seed_option
from sparse_engine.cli.data_options import SummaryColumn, TextColumn
from sparse_engine.errors import InputError
from sparse_engine.hf.loading import parse_dtype, quiet_transformers
from sparse_engine.progress import console_track
from sparse_engine.train.settings import METHODS, FinetuneSettings

_DEFAULT = FinetuneSettings()
_METHODS = "; ".join(f"{name}: {what}" for name, what in METHODS.items())


@app.command(epilog="Example: sparse-engine finetune opt-125m-2of4 --method sparse-full --train bills.jsonl --validation held-out.jsonl")
def finetune(
    ckpt: Annotated[str, typer.Argument(metavar="CKPT", help="Checkpoint directory or Hub id: dense, packed or masked dense.")],
    method: Annotated[str, typer.Option("--method", help=_METHODS + ".")],
    train: Annotated[
        str, typer.Option("--train", metavar="SOURCE", help="billsum, or a .jsonl (also .gz, .zst) or .parquet file.")
    ] = "billsum",
    validation: Annotated[
        str | None, typer.Option("--validation", metavar="SOURCE", help="For the validation loss; default: billsum's, where --train is it.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where to write; default: CKPT's name and the method.")] = None,
    train_limit: Annotated[int | None, typer.Option("--train-limit", min=1, help="Use this many training examples, by --seed.")] = None,
    validation_limit: Annotated[
        int, typer.Option("--validation-limit", min=1, help="Use at most this many validation examples, by --seed.")
    ] = 100,
    text_column: TextColumn = "text",
    summary_column: SummaryColumn = "summary",
    epochs: Annotated[float, typer.Option("--epochs", help="Passes over the training examples.")] = _DEFAULT.epochs,
    max_steps: Annotated[int, typer.Option("--max-steps", help="Stop after so many updates; -1: after --epochs.")] = _DEFAULT.max_steps,
    lr: Annotated[float, typer.Option("--lr", help="Peak learning rate of Adam; it falls linearly.")] = _DEFAULT.learning_rate,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Examples per device and step.")] = _DEFAULT.batch_size,
    accumulate: Annotated[int, typer.Option("--accumulate", help="Steps that make one update.")] = _DEFAULT.accumulate,
    dropout: Annotated[
        float, typer.Option("--dropout", help="The model's own dropout while training; -1 keeps what its config says.")
    ] = _DEFAULT.model_dropout or 0.0,
    evaluations: Annotated[int, typer.Option("--evaluations", help="Validations and kept checkpoints per epoch.")] = _DEFAULT.evaluations,
    patience: Annotated[
        int, typer.Option("--patience", help="Stop after so many validations without a better loss; 0: never.")
    ] = _DEFAULT.patience,
    bits: Annotated[
        int | None, typer.Option("--bits", help="8 or 4: quantised base of qlora (default 8) or sparse-lora; 0: not quantised.")
    ] = None,
    rank: Annotated[int, typer.Option("--rank", help="Of the adapters.")] = _DEFAULT.rank,
    alpha: Annotated[int, typer.Option("--alpha", help="Of the adapters: their update is scaled by alpha / rank.")] = _DEFAULT.alpha,
    lora_dropout: Annotated[float, typer.Option("--lora-dropout", help="Of the adapters' input.")] = _DEFAULT.lora_dropout,
    teacher: Annotated[str | None, typer.Option("--teacher", metavar="CKPT", help="Dense fine-tuned model to distil from.")] = None,
    distill_weight: Annotated[float, typer.Option("--distill-weight", help="Share of the loss.")] = _DEFAULT.distill_weight,
    distill_temperature: Annotated[
        float, typer.Option("--distill-temperature", help="Of both models' predictions.")
    ] = _DEFAULT.distill_temperature,
    distill_on: Annotated[str, typer.Option("--distill-on", help="answer, or all positions.")] = _DEFAULT.distill_on,
    distill_hidden: Annotated[
        float, typer.Option("--distill-hidden", help="Weight of the layers' normalised squared error.")
    ] = _DEFAULT.distill_hidden,
    max_text_tokens: Annotated[
        int, typer.Option("--max-text-tokens", help="Most tokens of a document; what is longer is cut.")
    ] = _DEFAULT.max_text_tokens,
    max_summary_tokens: Annotated[
        int, typer.Option("--max-summary-tokens", help="Most tokens of a summary; what is longer is cut.")
    ] = _DEFAULT.max_summary_tokens,
    text_windows: Annotated[
        int, typer.Option("--text-windows", help="Learn from so many windows of a long text, for distillation; 1: from its start.")
    ] = _DEFAULT.text_windows,
    answers: Annotated[
        str, typer.Option("--answers", help="reference summaries, the teacher's own, or both: sequence-level distillation.")
    ] = _DEFAULT.answers,
    precision: Annotated[str, typer.Option("--precision", help="auto, bf16 or fp32 computation; weights train in fp32.")] = "auto",
    seed: Annotated[int, seed_option("Of everything that is drawn at random.")] = _DEFAULT.seed,
    dtype: Dtype = None,
    device: Device = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from an interrupted run's last checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out.")] = False,
) -> None:
    """Fine-tune on the study's prompt, with the loss on the summary alone; the weights of the best validation loss are written.

    On several GPUs: accelerate launch --num_processes N -m sparse_engine finetune ...
    """
    settings = FinetuneSettings(
        method=method,
        epochs=epochs,
        max_steps=max_steps,
        learning_rate=lr,
        batch_size=batch_size,
        accumulate=accumulate,
        model_dropout=None if dropout < 0 else dropout,
        max_text_tokens=max_text_tokens,
        max_summary_tokens=max_summary_tokens,
        text_windows=text_windows,
        answers=answers,
        evaluations=evaluations,
        patience=patience,
        seed=seed,
        bits=bits,
        rank=rank,
        alpha=alpha,
        lora_dropout=lora_dropout,
        distill_weight=distill_weight,
        distill_temperature=distill_temperature,
        distill_on=distill_on,
        distill_hidden=distill_hidden,
        precision=precision,
    )
    stored, place = parse_dtype(dtype), parse_device(device)
    if validation is None and train != "billsum":
        raise InputError("--validation names the held-out examples for the validation loss; only billsum brings its own")
    target = out or Path(f"{Path(ckpt).name}-{method}")
    if target.exists() and not overwrite:
        raise InputError(f"{target} exists; choose another --out or pass --overwrite")

    from sparse_engine.data.pairs import load_pairs
    from sparse_engine.train.finetune import check_request
    from sparse_engine.train.finetune import finetune as run

    quiet_transformers()
    check_request(ckpt, settings, teacher)
    columns = {"seed": seed, "text_column": text_column, "summary_column": summary_column}
    examples = load_pairs(train, "train", limit=train_limit, **columns)  # type: ignore[arg-type]
    held_out = load_pairs(validation or "billsum", "validation", limit=validation_limit, fewer=True, **columns)  # type: ignore[arg-type]
    report = run(
        ckpt,
        target,
        examples,
        held_out,
        settings,
        teacher=teacher,
        device=place,
        dtype=stored,
        resume=resume,
        overwrite=overwrite,
        track=console_track,
    )
    typer.echo(
        f"{report.steps} steps on {len(examples)} examples, {report.trained_parameters:,} trained parameters, {report.seconds:.0f} s\n"
        f"validation loss {report.validation_loss:.4f} nats per answer token at step {report.best_step}\n"
        f"written to {report.out}"
    )

"""Summaries in batches: greedy, padded on the left, each kept in a JSONL file so that an interrupted run continues."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sparse_engine.data.pairs import Pair
from sparse_engine.data.prompt import END, extract_summary, prompt_tokens, truncate
from sparse_engine.errors import InputError
from sparse_engine.progress import Track, silent

__all__ = ["PREDICTIONS", "Prediction", "generate_summaries", "read_predictions"]

PREDICTIONS = "predictions.jsonl"


@dataclass(frozen=True, slots=True)
class Prediction:
    """One summary with all that scoring it needs.

    Attributes:
        source: the text as far as the model saw it.
        new_tokens: generated tokens, the end mark's included.
        seconds: its batch's time divided by the batch's size, tokenising left out.
    """

    id: str
    title: str
    source: str
    reference: str
    prediction: str
    prompt_tokens: int
    new_tokens: int
    seconds: float


def generate_summaries(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[Pair],
    folder: Path,
    *,
    batch_size: int = 8,
    max_new_tokens: int = 128,
    max_text_tokens: int = 1024,
    track: Track = silent,
) -> list[Prediction]:
    """Summarise each pair's text into ``folder``/predictions.jsonl, in the order of ``pairs``; what a stopped run left there is used.

    A text is cut to ``max_text_tokens`` tokens, and further where the model's positions would not hold prompt and summary.

    Raises:
        InputError: the model has too few positions, or unfinished predictions in ``folder`` are of other examples.
    """
    finished = folder / PREDICTIONS
    if finished.exists():
        return read_predictions(finished)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / (PREDICTIONS + ".partial")
    done = _unfinished(partial, pairs)
    positions = int(model.config.max_position_embeddings) - max_new_tokens
    todo = [i for i in range(len(pairs)) if i not in done]
    prompts = {i: prompt_tokens(pairs[i].text, tokenizer, max_text_tokens, positions) for i in todo}
    # Prompts of like length share a batch, longest first: the largest batch fails at once if it fails.
    todo.sort(key=lambda i: -len(prompts[i]))
    batches = [todo[at : at + batch_size] for at in range(0, len(todo), batch_size)]
    if batches:
        # Kernels are compiled and chosen on the first calls, which are no part of the time per summary.
        _generate(model, tokenizer, [prompts[i] for i in batches[0]], 2)
    with partial.open("a", encoding="utf-8") as lines:
        for batch in track(batches, "summarising", len(batches)):
            outputs, seconds = _generate(model, tokenizer, [prompts[i] for i in batch], max_new_tokens)
            for i, tokens in zip(batch, outputs, strict=True):
                pair = pairs[i]
                summary = extract_summary(tokenizer.decode(tokens, skip_special_tokens=True))
                source = truncate(pair.text.strip(), tokenizer, max_text_tokens)
                counts = (len(prompts[i]), len(tokens), seconds / len(batch))
                done[i] = Prediction(pair.id, pair.title, source, pair.summary.strip(), summary, *counts)
                lines.write(json.dumps({"row": i} | asdict(done[i]), ensure_ascii=False) + "\n")
            lines.flush()
    ordered = [done[i] for i in range(len(pairs))]
    whole = folder / (PREDICTIONS + ".tmp")
    whole.write_text("".join(json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in ordered), encoding="utf-8")
    whole.replace(finished)
    partial.unlink()
    return ordered


def read_predictions(path: Path) -> list[Prediction]:
    """Predictions of a finished run.

    Raises:
        InputError: the file is missing, or holds other lines.
    """
    try:
        return [Prediction(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        raise InputError(f"there is no {path}: generate first (`sparse-engine eval CKPT --out {path.parent}`)") from None
    except (TypeError, ValueError) as error:
        raise InputError(f"{path} does not hold predictions of this version ({error}); generate them again") from None


def _unfinished(partial: Path, pairs: Sequence[Pair]) -> dict[int, Prediction]:
    done: dict[int, Prediction] = {}
    if not partial.exists():
        return done
    whole = []
    for line in partial.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            break  # the line that was being written when the run was stopped
        row = entry.pop("row")
        if row >= len(pairs) or entry["id"] != pairs[row].id or entry["reference"] != pairs[row].summary.strip():
            raise InputError(f"{partial} holds predictions of other examples; remove it, or choose another --out")
        done[row] = Prediction(**entry)
        whole.append(line + "\n")
    partial.write_text("".join(whole), encoding="utf-8")
    return done


def _generate(model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int) -> tuple[list[list[int]], float]:
    """New tokens of each prompt, up to and with its end mark or end of sequence, and the seconds that the batch took."""
    from transformers import GenerationConfig

    width, pad = max(map(len, prompts)), int(model.config.pad_token_id)
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    eos = int(model.config.eos_token_id)
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=eos, pad_token_id=pad, stop_strings=[END]
    )
    cuda = model.device.type == "cuda"
    ids, mask = ids.to(model.device), mask.to(model.device)
    if cuda:
        torch.cuda.synchronize(model.device)
    started = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings, tokenizer=tokenizer)
    if cuda:
        torch.cuda.synchronize(model.device)
    seconds = time.perf_counter() - started
    rows = []
    for row in output[:, width:].tolist():
        # A finished row is filled up with padding, and by the time another ends.
        while row and row[-1] == pad:
            row.pop()
        rows.append(row)
    return rows, seconds

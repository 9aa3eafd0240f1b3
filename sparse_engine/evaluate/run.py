"""An evaluation folder: predictions and what making them cost (generation.json), then their scores (scores.json), apart.

The two halves need different libraries: a machine with the GPU generates, and one with the scoring packages scores the copied folder.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sparse_engine.checkpoint import Checkpoint, resolve
from sparse_engine.checkpoint.reader import content_digest
from sparse_engine.checkpoint.writer import read_json, write_json
from sparse_engine.data.files import read_documents
from sparse_engine.data.pairs import Pair
from sparse_engine.data.prompt import prompt_tokens
from sparse_engine.errors import InputError
from sparse_engine.evaluate.answer import answer_likelihood
from sparse_engine.evaluate.bootstrap import mean_interval
from sparse_engine.evaluate.generate import PREDICTIONS, Prediction, generate_summaries, read_predictions
from sparse_engine.evaluate.metrics import choose
from sparse_engine.evaluate.metrics.base import MetricSettings
from sparse_engine.evaluate.perplexity import window_perplexity
from sparse_engine.evaluate.resources import MemoryMeter, model_size
from sparse_engine.progress import Track, silent

__all__ = [
    "GENERATION",
    "SCORES",
    "EvaluateSettings",
    "Loaded",
    "generate",
    "load_for_evaluation",
    "perplexity_text",
    "score",
    "text_perplexity",
]

GENERATION, SCORES = "generation.json", "scores.json"
_WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateSettings:
    """How a model is run.

    Attributes:
        dtype: "bf16", "fp16" or "fp32" for what is not quantised; None keeps the checkpoint's own.
        backend: forces one kernel for packed layers.
    """

    batch_size: int = 8
    max_new_tokens: int = 128
    max_text_tokens: int = 1024
    max_summary_tokens: int = 128
    dtype: str | None = None
    backend: str | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to run.

    Attributes:
        kind: how its linears are held.
        digest: tells it from every other model; the same wherever its files lie.
    """

    model: Any
    tokenizer: Any
    kind: str
    disk_nbytes: int
    meter: MemoryMeter
    digest: str


def load_for_evaluation(ckpt: str, settings: EvaluateSettings, device: torch.device, *, base: str | None = None) -> Loaded:
    """A dense or packed checkpoint, or an adapter directory on its base (``base`` names it anew where it was moved).

    Raises:
        CheckpointError, InputError, KernelUnavailableError: it cannot be loaded or run.
    """
    from sparse_engine.hf.loading import load_model, load_tokenizer, parse_dtype
    from sparse_engine.train.adapters import Adapter, is_adapter, load_adapter

    dtype = parse_dtype(settings.dtype)
    if is_adapter(Path(ckpt)):
        if settings.backend is not None:
            raise InputError(f"{ckpt} is an adapter on its base; --backend chooses among kernels for packed checkpoints: merge it first")
        adapter = Adapter(Path(ckpt), base)
        tokenizer = load_tokenizer(adapter.base)
        meter = _fresh_meter(device)
        model = load_adapter(adapter, device, packed=True, dtype=dtype)
        disk = Checkpoint(adapter.base).nbytes + sum(file.stat().st_size for file in adapter.path.glob("*.safetensors"))
        kind = f"adapter on {adapter.settings.bits}-bit" if adapter.settings.bits else "adapter"
        return Loaded(model, tokenizer, kind, disk, meter, f"{content_digest(adapter.path)} on {content_digest(adapter.base)}")
    if base is not None:
        raise InputError(f"--base names an adapter's base, and {ckpt} is no adapter; leave it out")
    path = resolve(ckpt)
    tokenizer = load_tokenizer(path)
    meter = _fresh_meter(device)
    model = load_model(path, backend=settings.backend, dtype=dtype, device=device)
    checkpoint = Checkpoint(path)
    kind = "packed" if checkpoint.packed_layers else "dense"
    return Loaded(model, tokenizer, kind, checkpoint.nbytes, meter, content_digest(path))


def _fresh_meter(device: torch.device) -> MemoryMeter:
    """A meter that counts the model and its work, and not the code that they run on."""
    importlib.import_module("sparse_engine.hf.modeling_opt")
    importlib.import_module("transformers.generation")
    return MemoryMeter(device)


def generate(loaded: Loaded, pairs: Sequence[Pair], folder: Path, settings: EvaluateSettings, *, track: Track = silent) -> dict[str, Any]:
    """Predictions and answer likelihoods of ``pairs`` into ``folder``; what is there already is kept. Gives generation.json's content.

    Raises:
        InputError: the folder holds an evaluation of another model, made with other settings or of other examples.
    """
    description = {"model": loaded.digest, "settings": asdict(settings), "examples": [pair.id for pair in pairs]}
    started = folder / (GENERATION + ".started")
    for file in (folder / GENERATION, started):
        found = _read(file)
        if found is not None and found["description"] != description:
            raise InputError(f"{folder} holds an evaluation of another model, or with other settings or examples; choose another --out")
    if (found := _read(folder / GENERATION)) is not None:
        return found
    # Refused here, before anything is written.
    positions = int(loaded.model.config.max_position_embeddings)
    prompt_tokens("A", loaded.tokenizer, settings.max_text_tokens, positions - settings.max_new_tokens)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(started, {"description": description})
    loaded.meter.restart()
    summaries = generate_summaries(
        loaded.model,
        loaded.tokenizer,
        pairs,
        folder,
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
        max_text_tokens=settings.max_text_tokens,
        track=track,
    )
    peak = loaded.meter.peak()
    likelihood = answer_likelihood(
        loaded.model,
        loaded.tokenizer,
        pairs,
        batch_size=settings.batch_size,
        max_text_tokens=settings.max_text_tokens,
        max_summary_tokens=settings.max_summary_tokens,
        track=track,
    )
    seconds = sum(p.seconds for p in summaries)
    new = sum(p.new_tokens for p in summaries)
    size = model_size(loaded.model)
    result = {
        "description": description,
        "kind": loaded.kind,
        "device": _device_name(loaded.model.device),
        "kernels": _kernels(loaded.model),
        "loop": getattr(loaded.model, "generation_path", None) or "transformers",
        "examples": len(summaries),
        "seconds": seconds,
        "seconds_per_example": seconds / len(summaries),
        "new_tokens": new,
        "tokens_per_second": new / seconds if seconds else None,
        **peak,
        **asdict(size),
        "disk_nbytes": loaded.disk_nbytes,
        "answer_nll": likelihood.nll,
        "answer_tokens": likelihood.tokens,
        "answer_ppl": likelihood.ppl,
    }
    write_json(folder / GENERATION, result)
    started.unlink()
    return result


def perplexity_text(source: str) -> str:
    """A long text to measure perplexity on: a file's, or for "wikitext2" the test split of WikiText-2 from the Hub.

    Raises:
        InputError: the source cannot be read or reached.
    """
    return _wikitext() if source == "wikitext2" else "\n\n".join(row["text"] for row in read_documents(Path(source)))


def text_perplexity(loaded: Loaded, text: str, *, length: int = 2048, track: Track = silent) -> float:
    """Perplexity of a long text by the WikiText-2 protocol, over windows of ``length`` tokens or of the model's positions.

    Raises:
        InputError: the text is shorter than one window.
    """
    # With the tokenizer's own beginning of sequence in front of the whole text, as in the published figures.
    ids = torch.tensor(loaded.tokenizer(text, verbose=False)["input_ids"])
    length = min(length, int(loaded.model.config.max_position_embeddings))
    return window_perplexity(loaded.model, ids, length, track=track).ppl


def _wikitext() -> str:
    instead = "give a text file instead"
    try:
        datasets = importlib.import_module("datasets")
        rows = datasets.load_dataset(*_WIKITEXT, split="test")
    except ModuleNotFoundError:
        raise InputError(f"WikiText-2 needs the datasets package (pip install 'sparse-engine[eval]'); or {instead}") from None
    except Exception as error:  # the client raises a dozen unrelated types for one cause: no way to the data
        raise InputError(f"cannot reach {_WIKITEXT[0]} on the Hugging Face Hub ({type(error).__name__}); {instead}") from error
    return "\n\n".join(rows["text"])


def score(folder: Path, metrics: Sequence[str] | None = None, settings: MetricSettings | None = None) -> dict[str, Any]:
    """Score ``folder``'s predictions into scores.json, and give its content.

    A metric whose package or encoder is missing is left out with the reason under "skipped"; the others still come.

    Raises:
        InputError: there are no predictions, or a metric is unknown.
    """
    predictions = read_predictions(folder / PREDICTIONS)
    if not predictions:
        raise InputError(f"{folder / PREDICTIONS} is empty: there is nothing to score")
    settings = settings or MetricSettings()
    values: dict[str, list[float]] = {}
    skipped: dict[str, str] = {}
    for metric in choose(metrics):
        try:
            values |= metric.score(*_columns(predictions), settings)
        except InputError as error:
            _log.warning("%s is left out: %s", metric.name, error)
            skipped[metric.name] = str(error)
    result = {
        "metrics": {name: asdict(mean_interval(scores)) for name, scores in values.items()},
        "skipped": skipped,
        "settings": {"bertscore_model": Path(settings.bertscore_model).name, "bertscore_layers": settings.bertscore_layers},
        "each": values,
    }
    write_json(folder / SCORES, result)
    return result


def _columns(predictions: Sequence[Prediction]) -> tuple[list[str], list[str], list[str]]:
    return [p.prediction for p in predictions], [p.reference for p in predictions], [p.source for p in predictions]


def _read(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.exists() else None


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _kernels(model: Any) -> dict[str, str]:
    """The kernel that runs the packed layers, by the most activation rows that it is used for."""
    from sparse_engine.linear import SparseLinear

    for module in model.modules():
        if isinstance(module, SparseLinear):
            return {str(limit) if math.isfinite(limit) else "more": kernel.name for limit, kernel, _ in module.plan()}
    return {}

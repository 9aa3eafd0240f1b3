"""The embedded summariser dense and packed, side by side: bytes, speed, ROUGE, and whether packing changed any token."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_engine.checkpoint import Checkpoint
from sparse_engine.demo.embedded import CHECKPOINT, bills, pack
from sparse_engine.evaluate.rouge import rouge
from sparse_engine.evaluate.summarise import Summary, summarise
from sparse_engine.linear import SparseLinear
from sparse_engine.progress import Track, silent

__all__ = ["Comparison", "Side", "compare", "weight_nbytes"]

DTYPE = torch.float32
"""Type of computation: on a CPU without bf16 instructions fp32 is the faster, and near ties cannot be decided by rounding."""


@dataclass(frozen=True, slots=True)
class Side:
    """One model's figures: bytes of its weight files, of all weights and of its pruned linears in memory, decoding speed, ROUGE-L F.

    ``rouge_l`` is None where the rouge-score package, an optional one, is not installed.
    """

    file_nbytes: int
    weight_nbytes: int
    linear_nbytes: int
    tokens_per_second: float
    rouge_l: float | None
    summaries: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """``same_summaries`` of ``summaries`` came out of the packed model token for token as of the masked dense one.

    Dense and packed run in the engine; ``transformers_per_second`` are tokens per second of the masked dense one in transformers' loop.
    """

    dense: Side
    packed: Side
    kernels: tuple[str, ...]
    convert_seconds: float
    same_summaries: int
    summaries: int
    titles: tuple[str, ...]
    transformers_per_second: float


def weight_nbytes(model: nn.Module) -> int:
    """Bytes of all weights that ``model`` holds, a shared one once, packed ones as packed."""
    packed = [module for module in model.modules() if isinstance(module, SparseLinear)]
    inside = {id(buffer) for module in packed for buffer in module.buffers(recurse=False)}
    plain = [*model.parameters(), *(buffer for buffer in model.buffers() if id(buffer) not in inside)]
    return sum({t.data_ptr(): t.nbytes for t in plain}.values()) + sum(module.nbytes for module in packed)


def compare(out: Path, *, track: Track = silent) -> Comparison:
    """Pack the embedded summariser to ``out``, then summarise the example bills with it, with the dense one, and with the
    pruned weights unpacked to dense.

    Raises:
        InputError: ``out`` exists.
    """
    from transformers import AutoTokenizer

    from sparse_engine.hf import EngineOPTForCausalLM, SparseOPTForCausalLM

    rows = bills().rows
    texts, references = [row["text"] for row in rows], [row["summary"] for row in rows]
    converted = pack(out, track=track)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)

    def run(model: Any, name: str) -> list[Summary]:
        summarise(model, tokenizer, texts[:1], max_new_tokens=4)
        return summarise(model, tokenizer, texts, track=lambda items, _, total: track(items, f"summarising, {name}", total))

    linears = sorted(converted.layers)
    dense_model: Any = EngineOPTForCausalLM.from_pretrained(CHECKPOINT, dtype=DTYPE)
    dense_linear = sum(dense_model.get_parameter(f"{name}.weight").nbytes for name in linears)
    by_dense = run(dense_model, "dense")
    dense = _side(CHECKPOINT, weight_nbytes(dense_model), dense_linear, by_dense, references)
    del dense_model

    packed_model: Any = SparseOPTForCausalLM.from_pretrained(out, dtype=DTYPE)
    modules = [packed_model.get_submodule(name) for name in linears]
    by_packed = run(packed_model, "packed")
    packed = _side(out, weight_nbytes(packed_model), sum(module.nbytes for module in modules), by_packed, references)
    kernels = tuple(sorted({module.plan()[0][1].name for module in modules}))
    by_masked = run(packed_model.to_dense(), "pruned but dense")
    same = sum(a.tokens == b.tokens for a, b in zip(by_packed, by_masked, strict=True))
    titles = tuple(row["title"] for row in rows)
    return Comparison(dense, packed, kernels, converted.seconds, same, len(rows), titles, _speed(by_masked))


def _side(path: Path, weights: int, linears: int, made: Sequence[Summary], references: Sequence[str]) -> Side:
    texts = tuple(s.text for s in made)
    measured = rouge(texts, references).rougeL if importlib.util.find_spec("rouge_score") else None
    return Side(Checkpoint(path).nbytes, weights, linears, _speed(made), measured, texts)


def _speed(made: Sequence[Summary]) -> float:
    # The first token of each summary comes out of the prompt's pass and is counted in neither figure.
    return sum(len(s.tokens) - 1 for s in made) / sum(s.decode_seconds for s in made)

"""Whole-model generation on a processor: transformers eager in both its types against the engine, dense, packed and quantised.

    python bench/generate_cpu.py --models opt-125m --prompt 512 --new 33

Random weights at the real shapes, greedy, every row of the same prompt length, no token ends a row. ``prefill_ms`` is the time to the
first token, ``ms_per_token`` that of each further one; medians over rounds in which every model of the list has its turn, since other
work on a shared machine comes and goes. ``peak_bytes`` is what a generation takes beside the model. int8 and int4 rows multiply by an
int8 copy of the output head. A row's ``floor_ms`` is the time of reading its weights, head and keys and values once at the bandwidth
that a plain read of memory had in the same rounds.

With ``--llama-bench PROGRAM`` llama.cpp has its turns too, with dense bf16 and Q8_0 weights of the same shape (``llama_cpp.py``): its
own llama-bench measures a prompt, and steps behind one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_cpp
import torch
from llama_cpp import LlamaCpp
from transformers import GenerationConfig

from sparse_engine import native
from sparse_engine.bench.environment import device_name, environment, write_json
from sparse_engine.bench.models import opt_config, random_model
from sparse_engine.engine.generation import VARIABLE
from sparse_engine.evaluate.resources import MemoryMeter
from sparse_engine.linear import SparseLinear

CASES = (
    "hf-eager/dense/bf16",
    "hf-eager/dense/fp32",
    "sparse-engine/dense/bf16",
    "sparse-engine/2:4/bf16",
    "sparse-engine/4:8/bf16",
    "sparse-engine/unstructured/bf16",
    "sparse-engine/2:4/int8",
    "sparse-engine/2:4/int4",
)
_READ_BYTES = 256 << 20


@dataclass
class Case:
    engine: str
    pattern: str
    values: str
    model: Any
    first: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    peak: int | None = None

    @classmethod
    def make(cls, name: str, case: str) -> Case:
        engine, pattern, values = case.split("/")
        quantised = values in ("int8", "int4")
        dtype = torch.float32 if values == "fp32" else torch.bfloat16
        model = random_model(name, pattern, dtype, "cpu", value_type=values if quantised else "plain")
        if quantised:
            model.config.head_values = "int8"
        return cls(engine, pattern, values, model)

    def generate(self, ids: torch.Tensor, tokens: int) -> float:
        """Seconds of one generation."""
        os.environ[VARIABLE] = "engine" if self.engine == "sparse-engine" else "transformers"
        config = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=1)
        started = time.perf_counter()
        output = self.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        seconds = time.perf_counter() - started
        if output.shape != (ids.shape[0], ids.shape[1] + tokens):
            raise RuntimeError(f"{self.engine} gave {tuple(output.shape)}")
        return seconds

    def warm_up(self, ids: torch.Tensor, tokens: int) -> None:
        self.generate(ids, 2)
        meter = MemoryMeter(torch.device("cpu"))
        self.generate(ids, tokens)
        self.peak = meter.peak()["peak_host_nbytes"]

    def turn(self, ids: torch.Tensor, tokens: int) -> None:
        self.first.append(self.generate(ids, 1))
        self.total.append(self.generate(ids, tokens))

    def bytes_per_token(self, batch: int, length: float) -> float:
        """Bytes that one step must read: weights and head once, and the keys and values of ``length`` tokens per row."""
        decoder = self.model.model.decoder
        linears = sum(m.nbytes for m in self.model.modules() if isinstance(m, SparseLinear))
        linears += sum(m.weight.nbytes for m in decoder.modules() if type(m) is torch.nn.Linear)
        head = self.model.lm_head.weight
        stored = head.numel() if self.values in ("int8", "int4") else head.nbytes
        cache = 2 * len(decoder.layers) * self.model.config.hidden_size * head.element_size() * length * batch
        return float(linears + stored + cache)


@dataclass
class LlamaCase(Case):
    """llama.cpp, one sequence; ``model`` is its :class:`LlamaCpp`."""

    config: Any = None

    def warm_up(self, ids: torch.Tensor, tokens: int) -> None:
        """Its program warms up by itself."""

    def turn(self, ids: torch.Tensor, tokens: int) -> None:
        threads, prompt = torch.get_num_threads(), ids.shape[1]
        self.first.append(self.model.prompt_seconds(prompt, threads))
        self.total.append(self.first[-1] + (tokens - 1) * self.model.token_seconds(prompt, tokens - 1, threads))

    def bytes_per_token(self, batch: int, length: float) -> float:
        # Keys and values are fp16 by default.
        return float(self.model.nbytes + 2 * self.config.num_hidden_layers * self.config.hidden_size * 2 * length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="opt-125m")
    parser.add_argument("--cases", default=",".join(CASES), help="engine/pattern/values, comma-separated")
    parser.add_argument("--batches", default="1")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=33)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--name", default="generate.json")
    parser.add_argument("--llama-bench", type=Path, help="llama.cpp's program of that name, built for this processor")
    settings = parser.parse_args()
    rows: list[dict[str, Any]] = []
    file = (settings.out or Path("bench/results") / device_name()) / settings.name
    described = environment()
    with tempfile.TemporaryDirectory() as folder:
        for name in settings.models.split(","):
            cases = [Case.make(name, case) for case in settings.cases.split(",")]
            alone: list[Case] = []
            for values in llama_cpp.VALUES if settings.llama_bench else ():
                reference = LlamaCpp.make(settings.llama_bench, name, values, Path(folder))
                described["llama_cpp"] = reference.build()
                alone.append(LlamaCase("llama.cpp", "dense", values, reference, config=opt_config(name)))
            for batch in map(int, settings.batches.split(",")):
                rows += measure(name, cases + (alone if batch == 1 else []), batch, settings)
            write_json(file, {"environment": described, "rows": rows})


def measure(name: str, cases: list[Case], batch: int, settings: argparse.Namespace) -> list[dict[str, Any]]:
    ids = torch.randint(10, 50000, (batch, settings.prompt), generator=torch.Generator().manual_seed(0))
    memory = torch.ones(_READ_BYTES, dtype=torch.uint8)
    native.advise_huge_pages(memory)
    bandwidths = []
    for case in cases:
        case.first, case.total = [], []
        case.warm_up(ids, settings.new)
    for _ in range(settings.rounds):
        started = time.perf_counter()
        native.read(memory, torch.get_num_threads())
        bandwidths.append(_READ_BYTES / (time.perf_counter() - started))
        for case in cases:
            case.turn(ids, settings.new)
    bandwidth = statistics.median(bandwidths)
    rows = []
    for case in cases:
        first, total = statistics.median(case.first), statistics.median(case.total)
        read = case.bytes_per_token(batch, settings.prompt + settings.new / 2)
        row: dict[str, Any] = {"model": name, "batch": batch, "prompt_tokens": settings.prompt, "new_tokens": settings.new}
        row |= {"engine": case.engine, "pattern": case.pattern, "values": case.values, "prefill_ms": 1e3 * first}
        row |= {"ms_per_token": 1e3 * (total - first) / (settings.new - 1), "tokens_per_s": batch * settings.new / total}
        row |= {"total_s": total, "peak_bytes": case.peak, "floor_ms": 1e3 * read / bandwidth, "read_bytes_per_s": bandwidth}
        sys.stderr.write(f"{row}\n")
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()

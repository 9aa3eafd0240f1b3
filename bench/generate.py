"""Whole-model generation: transformers eager, transformers with a static cache and torch.compile, and the engine, dense and packed.

    python bench/generate.py --models opt-125m,opt-1.3b,opt-6.7b,opt-13b --batches 1,16,64 --out bench/results/h200

Random weights at the real shapes, greedy, every row of the same prompt length, no token ends a row. ``prefill_ms`` is the time to the
first token, ``ms_per_token`` that of each further one; medians. Rows of one model are measured one behind the other in one process.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from sparse_engine.bench.environment import device_name, environment, write_json
from sparse_engine.bench.models import random_model
from sparse_engine.engine.generation import VARIABLE

ENGINES = ("hf-eager", "hf-static", "sparse-engine")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="opt-125m")
    parser.add_argument("--patterns", default="dense,2:4,4:8,unstructured", help="of the engine's rows; the others run dense")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--batches", default="1")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--name", default="generate.json")
    settings = parser.parse_args()
    rows: list[dict[str, Any]] = []
    file = (settings.out or Path("bench/results") / device_name()) / settings.name
    for name in settings.models.split(","):
        cases = [("dense", engine) for engine in settings.engines.split(",") if engine != "sparse-engine"]
        if "sparse-engine" in settings.engines:
            cases += [(pattern, "sparse-engine") for pattern in settings.patterns.split(",")]
        model, held = None, None
        for pattern, engine in cases:
            if held != pattern:
                model = None
                release()
                model, held = random_model(name, pattern, torch.bfloat16, settings.device), pattern
            for batch in map(int, settings.batches.split(",")):
                row = measure(model, engine, batch, settings)
                rows.append({"model": name, "batch": batch, "prompt_tokens": settings.prompt, "new_tokens": settings.new} | row)
                rows[-1] |= {"engine": engine, "pattern": pattern, "values": "bf16"}
                sys.stderr.write(f"{rows[-1]}\n")
                write_json(file, {"environment": environment(), "rows": rows})
        model = None
        release()


def release() -> None:
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(model: Any, engine: str, batch: int, settings: argparse.Namespace) -> dict[str, Any]:
    os.environ[VARIABLE] = "engine" if engine == "sparse-engine" else "transformers"
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, model.config.vocab_size, (batch, settings.prompt), generator=generator).to(model.device)
    cuda = ids.is_cuda
    if cuda:
        torch.cuda.reset_peak_memory_stats()

    def timed(tokens: int) -> float:
        config = GenerationConfig(
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=1,
            cache_implementation="static" if engine == "hf-static" else None,
        )
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        if output.shape != (batch, settings.prompt + tokens):
            raise RuntimeError(f"{engine} gave {tuple(output.shape)}")
        return seconds

    for _ in range(2):
        timed(settings.new)
    timed(1)
    first = statistics.median(timed(1) for _ in range(settings.rounds))
    total = statistics.median(timed(settings.new) for _ in range(settings.rounds))
    return {
        "prefill_ms": 1e3 * first,
        "ms_per_token": 1e3 * (total - first) / (settings.new - 1),
        "tokens_per_s": batch * settings.new / total,
        "total_s": total,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    }


if __name__ == "__main__":
    main()

"""Whole-model generation: transformers eager, transformers with a static cache and torch.compile, and the engine, dense and packed.

    python bench/generate.py --models opt-125m,opt-1.3b,opt-6.7b,opt-13b --batches 1,16,64 --budget
    python bench/generate.py --models opt-125m --prompt 1024 --documents 100 --batches 1,10,100 --name generate-documents.json

Random weights at the real shapes, greedy, every row of the same prompt length, no token ends a row. ``prefill_ms`` is the time to the
first token, ``ms_per_token`` that of each further one; medians. With ``--documents``, ``total_s`` is that of so many prompts, ``batch`` at
a time. ``weight_bytes`` and ``cache_bytes`` are what a step reads at least. Rows of one model are measured one behind the other in one
process; ``--keep`` adds them to those that the file holds of the same GPU, ``--missing`` also leaves out what it holds already, and
``--seconds`` begins no case after so many: called again with ``--missing``, it goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from sparse_engine.bench.budget import budget, profiled, split_by_clocks
from sparse_engine.bench.environment import device_name, environment, write_json
from sparse_engine.bench.models import random_model
from sparse_engine.engine.choice import Choice
from sparse_engine.engine.generation import VARIABLE
from sparse_engine.engine.runner import Runner, runner_for
from sparse_engine.linear import SparseLinear

ENGINES = ("hf-eager", "hf-static", "sparse-engine")
KEY = ("model", "batch", "prompt_tokens", "new_tokens", "documents", "engine", "pattern", "values", "head")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="opt-125m")
    parser.add_argument("--patterns", default="dense,2:4,4:8,unstructured", help="of the engine's rows; the others run dense")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--batches", default="1")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--documents", type=int, help="prompts of a run, a batch at a time (default: one batch)")
    parser.add_argument("--heads", default="bf16", help="types of the engine's output head: bf16, int8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", action="store_true", help="also profile the engine's steps: where each microsecond goes")
    parser.add_argument("--keep", action="store_true", help="keep the file's rows that are not measured now")
    parser.add_argument("--missing", action="store_true", help="as --keep, and measure only the rows that the file has not")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case after so many seconds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--name", default="generate.json")
    settings = parser.parse_args()
    file = (settings.out or Path("bench/results") / device_name()) / settings.name
    found = Results(file, keep=settings.keep or settings.missing)
    failed, started, left = 0, time.monotonic(), []
    batches = [int(batch) for batch in settings.batches.split(",")]
    for name in settings.models.split(","):
        cases = [("dense", engine) for engine in settings.engines.split(",") if engine != "sparse-engine"]
        if "sparse-engine" in settings.engines.split(","):
            cases += [(pattern, "sparse-engine") for pattern in settings.patterns.split(",")]
        model, held, case = None, None, None
        for pattern, engine in cases:
            for head, batch in itertools.product(settings.heads.split(",") if engine == "sparse-engine" else ["bf16"], batches):
                key = {"model": name, "batch": batch, "prompt_tokens": settings.prompt, "new_tokens": settings.new}
                key |= {"documents": settings.documents, "engine": engine, "pattern": pattern, "values": "bf16", "head": head}
                wants_budget = settings.budget and engine == "sparse-engine"
                if settings.missing and found.holds(key, budget=wants_budget):
                    continue
                if time.monotonic() - started > settings.seconds:
                    left.append(key)
                    continue
                if held != pattern:
                    model = case = None
                    release()
                    model, held = random_model(name, pattern, torch.bfloat16, settings.device), pattern
                model.config.head_values = None if head == "bf16" else head
                try:
                    case = Case(model, engine, batch, settings)
                    found.add(key, case.measure(), case.budget() if wants_budget else None)
                except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
                    # What one engine cannot run leaves the others' figures to be measured; the exit code tells.
                    failed += 1
                    sys.stderr.write(f"{key} failed: {error}\n")
        model = case = None
        release()
    if left:
        sys.stderr.write(f"{len(left)} cases left after {settings.seconds:g} s; --missing goes on with {left[0]}\n")
    return int(failed > 0 or bool(left))


class Results:
    """The file's rows and budgets, written whole after each case."""

    def __init__(self, file: Path, *, keep: bool) -> None:
        self.file, self.environment = file, environment()
        self.rows: list[dict[str, Any]] = []
        self.budgets: list[dict[str, Any]] = []
        if keep and file.is_file():
            held = json.loads(file.read_text())
            if held["environment"]["gpu"] != self.environment["gpu"]:
                raise SystemExit(f"{file} was measured on {held['environment']['gpu']}: give another --out or --name")
            self.rows, self.budgets = held["rows"], held.get("budgets", [])

    def holds(self, key: dict[str, Any], *, budget: bool) -> bool:
        return any(_same(held, key) for held in self.rows) and (not budget or any(_same(held, key) for held in self.budgets))

    def add(self, key: dict[str, Any], row: dict[str, Any], parts: list[dict[str, Any]] | None) -> None:
        self.rows = [held for held in self.rows if not _same(held, key)] + [key | row]
        if parts is not None:
            self.budgets = [held for held in self.budgets if not _same(held, key)] + [key | {"parts": parts}]
        sys.stderr.write(f"{key | row}\n")
        write_json(self.file, {"environment": self.environment, "rows": self.rows, "budgets": self.budgets})


def _same(held: dict[str, Any], key: dict[str, Any]) -> bool:
    defaults = {"documents": None, "head": "bf16"}
    return all(held.get(name, defaults.get(name)) == key[name] for name in KEY)


def release() -> None:
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Case:
    """A model that one engine runs at one batch size."""

    def __init__(self, model: Any, engine: str, batch: int, settings: argparse.Namespace) -> None:
        self.model, self.engine, self.batch, self.settings = model, engine, batch, settings
        generator = torch.Generator().manual_seed(0)
        self.prompts = settings.documents or batch
        ids = torch.randint(10, model.config.vocab_size, (self.prompts, settings.prompt), generator=generator)
        self.ids = ids.to(model.device)
        os.environ[VARIABLE] = "engine" if engine == "sparse-engine" else "transformers"

    def generate(self, tokens: int, prompts: int) -> float:
        """Seconds that ``tokens`` new tokens of the first ``prompts`` take."""
        config = GenerationConfig(
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=1,
            cache_implementation="static" if self.engine == "hf-static" else None,
        )
        self._wait()
        started = time.perf_counter()
        for ids in self.ids[:prompts].split(self.batch):
            output = self.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
            if output.shape != (len(ids), self.settings.prompt + tokens):
                raise RuntimeError(f"{self.engine} gave {tuple(output.shape)}")
        self._wait()
        return time.perf_counter() - started

    def measure(self) -> dict[str, Any]:
        new, rounds, cuda = self.settings.new, self.settings.rounds, self.ids.is_cuda
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        # An eager loop has nothing to compile or capture that a few tokens would not.
        for _ in range(1 if self.engine == "hf-eager" else 2):
            self.generate(min(8, new) if self.engine == "hf-eager" else new, self.batch)
        self.generate(1, self.batch)
        first = statistics.median(self.generate(1, self.batch) for _ in range(rounds))
        batch_s = statistics.median(self.generate(new, self.batch) for _ in range(rounds))
        total = batch_s
        if self.prompts > self.batch:
            total = statistics.median(self.generate(new, self.prompts) for _ in range(rounds))
        return {
            "prefill_ms": 1e3 * first,
            "ms_per_token": 1e3 * (batch_s - first) / (new - 1),
            "tokens_per_s": self.prompts * new / total,
            "total_s": total,
            "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
            "weight_bytes": weight_bytes(self.model),
            "cache_bytes": self._cache_bytes(),
            "path": self.model.generation_path,
        }

    def budget(self) -> list[dict[str, Any]] | None:
        if not self.ids.is_cuda:
            return None
        rows = budget(profiled(lambda tokens: self.generate(tokens, self.batch)))
        runner = runner_for(self.model)
        whole = getattr(runner, "whole", None) if self.batch == 1 else None
        if not isinstance(runner, Runner) or whole is None:
            return rows
        session = runner.session(1, self.settings.prompt + self.settings.new, Choice(), eos=[], pad=1)
        session.admit([0], [self.ids[0]], [self.settings.prompt + self.settings.new])
        cache, clocks = session.cache, []
        for _ in range(min(20, self.settings.new - 1)):
            clocks.append(torch.zeros(whole.blocks, 5 * whole.dimensions.layers + 2, 2, dtype=torch.int64, device=self.ids.device))
            whole(cache.k, cache.v, cache.state, greedy=True, clocks=clocks[-1])
        return split_by_clocks(rows, torch.stack(clocks).cpu())

    def _cache_bytes(self) -> int:
        """Of keys and values that a step reads, in the middle of the generation."""
        config = self.model.config
        tokens = self.settings.prompt + self.settings.new // 2
        return 2 * config.num_hidden_layers * self.batch * tokens * config.hidden_size * self.model.dtype.itemsize

    def _wait(self) -> None:
        if self.ids.is_cuda:
            torch.cuda.synchronize()


def weight_bytes(model: Any) -> int:
    """Of the weights that a step reads: the layers' products, packed ones as values and bitmask, and the output head."""
    size = model.dtype.itemsize
    head = model.lm_head.weight
    total = head.numel() * (1 if getattr(model.config, "head_values", None) else size)
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            places = module.in_features * module.out_features
            total += int(places * module.pattern.density * size) + places // 8
        elif isinstance(module, torch.nn.Linear) and ".layers." in name:
            total += module.weight.nbytes
    return total


if __name__ == "__main__":
    sys.exit(main())

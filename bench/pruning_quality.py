"""Perplexity after each pruner and pattern, and what converting costs: the quality table of the README.

Every row converts the checkpoint in a process of its own with `sparse-engine convert` and loads the packed result. The
perplexity is over whole held-out documents cut to --length tokens; the calibration text is other text of the same kind.

    python bench/pruning_quality.py --model $SPARSE_ENGINE_DATA/models/base-28m
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from reporting import device_name, environment, quality_options, write_results
from transformers import AutoTokenizer, OPTForCausalLM

from sparse_engine import SparseOPTForCausalLM, pruners
from sparse_engine.data.files import read_documents
from sparse_engine.evaluate.perplexity import document_perplexity
from sparse_engine.pruners.base import Needs

PATTERNS = ("0.5", "4:8", "2:4")


def main() -> None:
    parser = quality_options(__doc__, documents=40, samples=64)
    parser.add_argument("--pruners", nargs="*", default=sorted(pruners.all_pruners()))
    parser.add_argument("--patterns", nargs="*", default=PATTERNS)
    settings = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    rows = read_documents(settings.heldout)[: settings.documents]
    documents = [torch.tensor(tokenizer(row["text"])["input_ids"]) for row in rows]
    dense = OPTForCausalLM.from_pretrained(settings.model, dtype=torch.float32).to(settings.device).eval()
    measured = document_perplexity(dense, documents, settings.length)
    results = [{"model": settings.model.name, "pruner": "none", "pattern": "dense", "perplexity": measured.ppl, "tokens": measured.tokens}]
    report(results[-1])
    for name in settings.pruners:
        for pattern in settings.patterns:
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "packed"
                cost = convert(settings, name, pattern, out)
                packed = SparseOPTForCausalLM.from_pretrained(out, dtype=torch.float32).to(settings.device)
                ppl = document_perplexity(packed, documents, settings.length)
            results.append(
                {"model": settings.model.name, "pruner": name, "pattern": pattern, "perplexity": ppl.ppl, "tokens": ppl.tokens} | cost
            )
            report(results[-1])
    write_results(device_name(), "pruning-quality", environment(), results)


def convert(settings: argparse.Namespace, pruner: str, pattern: str, out: Path) -> dict[str, float | int]:
    """Run the command line as a user would; wall-clock seconds and peak resident memory of that process in bytes."""
    chosen = ["--nm", pattern] if ":" in pattern else ["--sparsity", pattern]
    command = [sys.executable, "-m", "sparse_engine", "convert", settings.model, *chosen, "--pruner", pruner, "--out", out]
    if pruners.get(pruner).needs is not Needs.NOTHING:
        command += ["--calibration", settings.calibration, "--samples", str(settings.samples), "--length", str(settings.length)]
    command += ["--device", settings.device]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # noqa: S603
    # Not Popen.wait: this also gives the resources that this very process used.
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(map(str, command))} failed")
    return {"convert_seconds": time.monotonic() - started, "convert_peak_rss_bytes": usage.ru_maxrss * 1024}


def report(row: dict[str, object]) -> None:
    print(row, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()

"""Ten held-out bills summarised by a summariser and by its packed 2:4 form: tokens/s, ROUGE-L, and whether the outputs are those
of the masked dense model.

    python bench/summarise_bills.py --model $SPARSE_ENGINE_DATA/models/summ-28m
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from reporting import device_name, environment, write_results
from transformers import AutoTokenizer, OPTForCausalLM

from sparse_engine import SparseOPTForCausalLM, SparsityPattern
from sparse_engine.checkpoint import Checkpoint
from sparse_engine.convert import convert
from sparse_engine.data.calibration import calibration_tokens
from sparse_engine.data.files import read_documents
from sparse_engine.evaluate.rouge import rouge
from sparse_engine.evaluate.summarise import summarise
from sparse_engine.progress import console_track

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def main() -> None:
    data = Path(os.environ.get("SPARSE_ENGINE_DATA", "."))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=data / "models" / "summ-28m")
    parser.add_argument("--calibration", type=Path, default=data / "data" / "validation.jsonl.gz")
    parser.add_argument("--heldout", type=Path, default=data / "data" / "test.jsonl.gz")
    parser.add_argument("--documents", type=int, default=10)
    parser.add_argument("--nm", default="2:4")
    parser.add_argument("--values", choices=sorted(DTYPES), default="bf16")
    settings = parser.parse_args()

    dtype = DTYPES[settings.values]
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    bills = read_documents(settings.heldout)[: settings.documents]
    with tempfile.TemporaryDirectory() as folder:
        packed, masked = Path(folder) / "packed", Path(folder) / "masked"
        tokens = calibration_tokens(str(settings.calibration), tokenizer, samples=64, length=1024, as_prompts=True)
        pattern = SparsityPattern.parse(settings.nm)
        convert(settings.model, packed, pattern=pattern, pruner="sparsegpt", calibration=tokens, track=console_track)
        convert(packed, masked, output="dense")
        models = {
            "dense": OPTForCausalLM.from_pretrained(settings.model, dtype=dtype),
            "masked dense": OPTForCausalLM.from_pretrained(masked, dtype=dtype),
            "packed": SparseOPTForCausalLM.from_pretrained(packed, dtype=dtype),
        }
        sizes = {"dense": settings.model, "masked dense": masked, "packed": packed}
        rows: list[dict[str, Any]] = []
        outputs: dict[str, list[list[int]]] = {}
        for name, model in models.items():
            texts = [bill["text"] for bill in bills]
            summarise(model, tokenizer, texts[:1], max_new_tokens=8)
            summaries = summarise(model, tokenizer, texts, track=console_track)
            outputs[name] = [list(summary.tokens) for summary in summaries]
            produced = sum(len(ids) for ids in outputs[name])
            prompt_seconds = sum(summary.prompt_seconds for summary in summaries)
            decode_seconds = sum(summary.decode_seconds for summary in summaries)
            scores = rouge([summary.text for summary in summaries], [bill["summary"] for bill in bills])
            rows.append(
                {
                    "model": settings.model.name,
                    "engine": name,
                    "pattern": "dense" if name == "dense" else settings.nm,
                    "values": settings.values,
                    "documents": len(bills),
                    "new_tokens": produced,
                    "prompt_seconds": prompt_seconds,
                    "decode_seconds": decode_seconds,
                    # The first token of each summary comes with its prompt.
                    "decode_tokens_per_s": (produced - len(bills)) / decode_seconds,
                    "rougeL": scores.rougeL,
                    "weight_bytes": Checkpoint(sizes[name]).nbytes,
                }
            )
            print(rows[-1], flush=True)  # noqa: T201
    same = sum(a == b for a, b in zip(outputs["masked dense"], outputs["packed"], strict=True))
    rows[-1]["outputs_equal_to_masked_dense"] = same
    print(f"packed outputs equal to the masked dense model's: {same} of {len(bills)}")  # noqa: T201
    write_results(device_name(), f"summarise-{settings.model.name}-{settings.values}", environment(), rows)


if __name__ == "__main__":
    main()

"""Perplexity and size after quantising the kept values of a pruned model, against the same model with its own type of values.

The checkpoint is pruned once by `sparse-engine convert`, and the packed result quantised by it; each is then loaded in float32. The
perplexity is over whole held-out documents cut to --length tokens; the calibration text is other text of the same kind.

    python bench/quantisation_quality.py --model $SPARSE_ENGINE_DATA/models/base-28m
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch
from reporting import device_name, environment, write_results
from transformers import AutoTokenizer

from sparse_engine import SparseOPTForCausalLM, value_types
from sparse_engine.checkpoint import Checkpoint
from sparse_engine.convert import convert
from sparse_engine.data.calibration import calibration_tokens
from sparse_engine.data.files import read_documents
from sparse_engine.evaluate.perplexity import document_perplexity
from sparse_engine.pattern import SparsityPattern


def main() -> None:
    data = Path(os.environ.get("SPARSE_ENGINE_DATA", "."))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=data / "models" / "base-28m")
    parser.add_argument("--calibration", type=Path, default=data / "data" / "validation.jsonl.gz")
    parser.add_argument("--heldout", type=Path, default=data / "data" / "test.jsonl.gz")
    parser.add_argument("--documents", type=int, default=20)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--pruner", default="sparsegpt")
    parser.add_argument("--patterns", nargs="*", default=["2:4"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    settings = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    documents = [torch.tensor(tokenizer(row["text"])["input_ids"]) for row in read_documents(settings.heldout)[: settings.documents]]
    samples = calibration_tokens(str(settings.calibration), tokenizer, samples=settings.samples, length=settings.length, seed=0)
    results = []
    for pattern in settings.patterns:
        with tempfile.TemporaryDirectory() as folder:
            pruned = convert(
                settings.model,
                Path(folder) / "pruned",
                pattern=SparsityPattern.parse(pattern),
                pruner=settings.pruner,
                calibration=samples,
                device=settings.device,
            )
            for name in value_types.all_value_types():
                out = pruned.out if name == value_types.PLAIN else convert(pruned.out, Path(folder) / name, values=name).out
                layers = Checkpoint(out).packed_layers
                model = SparseOPTForCausalLM.from_pretrained(out, dtype=torch.float32).to(settings.device)
                measured = document_perplexity(model, documents, settings.length)
                row = {"model": settings.model.name, "pruner": settings.pruner, "pattern": pattern}
                row["values"] = name if name != value_types.PLAIN else str(next(iter(layers.values())).dtype).removeprefix("torch.")
                row |= {"perplexity": measured.ppl, "tokens": measured.tokens, "packed_linear_nbytes": linear_nbytes(out)}
                results.append(row)
                print(row, flush=True)  # noqa: T201
    write_results(device_name(), "quantisation-quality", environment(), results)


def linear_nbytes(path: Path) -> int:
    """Bytes of the packed linears' weights in a checkpoint, biases left out."""
    checkpoint = Checkpoint(path)
    stored = (name.rpartition(".") for name in checkpoint.names())
    return sum(
        checkpoint.tensor_nbytes(f"{name}.{part}") for name, _, part in stored if name in checkpoint.packed_layers and part != "bias"
    )


if __name__ == "__main__":
    main()

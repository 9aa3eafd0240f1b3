"""Bytes of the pruned linears, dense against packed: on disk, as tensors, and as resident memory of a process that runs the model.

The model has OPT-1.3b's layers (hidden 2048, ffn 8192), a few of them, random weights, and a small vocabulary so that the
linears are what is measured. Each variant is loaded and run for one token in a process of its own; its resident memory is
what /proc/self/status reports, less what it reported before the model was loaded.

    python bench/size_and_memory.py
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from reporting import device_name, environment, write_results
from transformers import OPTConfig, OPTForCausalLM

from sparse_engine import SparseOPTForCausalLM, SparsityPattern
from sparse_engine.convert import convert
from sparse_engine.linear import SparseLinear

PATTERNS = ("2:4", "4:8", "0.5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--child", choices=("dense", "packed"), help=argparse.SUPPRESS)
    parser.add_argument("--path", help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.child:
        print(json.dumps(run(settings.child, settings.path)))  # noqa: T201
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "dense"
        make(source, settings.layers)
        dense = child("dense", source)
        for pattern in PATTERNS:
            out = Path(folder) / "packed"
            report = convert(source, out, pattern=SparsityPattern.parse(pattern), overwrite=True)
            packed = child("packed", out)
            rows.append(
                {
                    "model": f"OPT-1.3b layers x {settings.layers}",
                    "pattern": pattern,
                    "values": "bf16",
                    "dense_bytes": report.dense_linear_nbytes,
                    "packed_disk_bytes": report.packed_linear_nbytes,
                    "packed_tensor_bytes": packed["linear_bytes"],
                    "dense_rss_bytes": dense["rss_bytes"],
                    "packed_rss_bytes": packed["rss_bytes"],
                    "disk_ratio": report.packed_linear_nbytes / report.dense_linear_nbytes,
                    "tensor_ratio": packed["linear_bytes"] / dense["linear_bytes"],
                    "rss_ratio": packed["rss_bytes"] / dense["rss_bytes"],
                }
            )
            print(rows[-1], flush=True)  # noqa: T201
    write_results(device_name(), "size-and-memory", environment(), rows)


def make(path: Path, layers: int) -> None:
    config = OPTConfig(
        vocab_size=512, hidden_size=2048, word_embed_proj_dim=2048, ffn_dim=8192, num_hidden_layers=layers, num_attention_heads=32
    )
    torch.manual_seed(0)
    OPTForCausalLM(config).to(torch.bfloat16).save_pretrained(path)


def child(kind: str, path: Path) -> dict[str, int]:
    command = [sys.executable, __file__, "--child", kind, "--path", str(path)]
    result: dict[str, int] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)  # noqa: S603
    return result


def run(kind: str, path: str) -> dict[str, int]:
    ids = torch.ones(1, 1, dtype=torch.int64)
    before = resident()
    model = (SparseOPTForCausalLM if kind == "packed" else OPTForCausalLM).from_pretrained(path, dtype=torch.bfloat16)
    with torch.inference_mode():
        for _ in range(3):
            model(ids)
    after = resident()
    modules = model.model.decoder.layers.modules()
    if kind == "packed":
        linear_bytes = sum(module.nbytes for module in modules if isinstance(module, SparseLinear))
    else:
        linear_bytes = sum(module.weight.nbytes for module in modules if isinstance(module, torch.nn.Linear))
    return {"rss_bytes": after - before, "linear_bytes": linear_bytes}


def resident() -> int:
    match = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


if __name__ == "__main__":
    main()

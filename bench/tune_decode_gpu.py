"""Measures every candidate tile of the CUDA decode kernels for the OPT models' shapes and writes the table that `choose` reads.

python bench/tune_decode_gpu.py --out sparse_engine/backends/cuda_tiles_nvidia-h200.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from linear_decode_gpu import copies_of, graph_us, repeated
from opt_shapes import HIDDEN, LAYERS, PATTERNS, random_packed, shape_of

from sparse_engine import cuda, formats, registry
from sparse_engine.backends import cuda_tiles
from sparse_engine.backends.cuda_decode import Gpu, gpu, run_decode
from sparse_engine.errors import KernelUnavailableError
from sparse_engine.pattern import SparsityPattern

KERNELS = {"2:4": "cuda_nm", "4:8": "cuda_nm", "unstructured": "cuda_unstructured"}


def shapes(models: list[str]) -> list[tuple[int, int]]:
    return list(dict.fromkeys(shape_of(model, layer) for model in models for layer in LAYERS))


def tune(rows: int, columns: int, pattern: str, buckets: list[int], here: Gpu) -> Iterator[tuple[int, list[Any]]]:
    packed = random_packed((rows, columns), SparsityPattern.parse(PATTERNS[pattern]), torch.bfloat16, "cuda")
    unpacked = formats.get(packed.format).unpack(packed).float()
    layouts = copies_of(dict(registry.get(KERNELS[pattern]).prepare(packed)))
    for m in buckets:
        x = torch.randn(m, columns, device="cuda", dtype=torch.bfloat16)
        expected = x.float() @ unpacked.T
        best: list[Any] | None = None
        for choice in cuda_tiles.candidates(pattern, rows, columns, m, here):

            def product(held: dict[str, torch.Tensor], choice: Any = choice, x: torch.Tensor = x) -> torch.Tensor:
                streams = (held["masks"], held["offsets"], held["extent"].shape[2]) if "masks" in held else None
                return run_decode(lambda *_: choice, x, held["weight"], None, None, rows, columns, False, streams)

            try:
                if not float((product(layouts[0]) - expected).norm() / expected.norm()) < 1e-2:
                    raise RuntimeError(f"{pattern} {rows}x{columns} m {m} {choice}: wrong product")
                us = graph_us(repeated([lambda held=held: product(held) for held in layouts]), replays=5, warm_seconds=0.003)
            except KernelUnavailableError as error:
                print(f"{choice}: {error}", flush=True)  # noqa: T201
                continue
            if best is None or us < best[-1]:
                best = cuda_tiles.entry_of(*choice, us)
        if best:
            yield m, best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=HIDDEN, default=list(HIDDEN))
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=list(PATTERNS))
    parser.add_argument("--rows", nargs="+", type=int, choices=cuda_tiles.BUCKETS, default=list(cuda_tiles.BUCKETS))
    parser.add_argument("--out", type=Path, help="default: this user's table for this GPU")
    parser.add_argument("--compile", help="only compile every candidate for this architecture, such as sm_90a, into the cache")
    settings = parser.parse_args()
    if settings.compile:
        here = Gpu("NVIDIA H200", settings.compile, 132, True, 232448)
        todo = {
            (source.file, *sorted({**tile.macros(), **dict(source.macros), "ELEM_BF16": 1}.items())): source
            for (rows, columns), pattern, m in itertools.product(shapes(settings.models), settings.patterns, settings.rows)
            for source, tile in cuda_tiles.candidates(pattern, rows, columns, m, here)
        }
        for file, *macros in sorted(todo):
            cuda.compile_cubin(file, settings.compile, dict(macros))
        print(f"{len(todo)} kernels compiled")  # noqa: T201
        return 0
    if reason := cuda.why_unavailable():
        print(f"tuning {reason}", file=sys.stderr)  # noqa: T201
        return 2
    here = gpu(torch.cuda.current_device())
    path = settings.out or cuda_tiles.table_path(here)
    path.parent.mkdir(parents=True, exist_ok=True)
    tiles: dict[str, dict[str, dict[str, list[Any]]]] = {}
    for (rows, columns), pattern in itertools.product(shapes(settings.models), settings.patterns):
        found = {str(m): entry for m, entry in tune(rows, columns, pattern, settings.rows, here)}
        tiles.setdefault(pattern, {})[f"{rows}x{columns}"] = found
        times = ", ".join(f"m {m}: {entry[-1]}" for m, entry in found.items())
        print(f"{pattern} {rows}x{columns} us: {times}", flush=True)  # noqa: T201
        lines = json.dumps({"gpu": here.name, "tiles": tiles}, separators=(",", ":")).replace('},"', '},\n"')
        path.write_text(lines + "\n")
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Times the chosen CUDA kernel against dense cuBLAS for the linear layers of the OPT models and few activation rows.

Every product reads its weights from memory: they rotate over copies larger than the L2 cache. Times are medians over replays
of a CUDA graph of back-to-back products, where kernels that allow it overlap their start with the end of the one before.

    python bench/linear_decode_gpu.py --models opt-125m opt-6.7b --rows 1 8
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import reporting
import torch
import torch.nn.functional as F
from opt_shapes import HIDDEN, LAYERS, PATTERNS, random_packed, shape_of
from torch import Tensor

from sparse_engine import cuda, formats, registry
from sparse_engine.pattern import SparsityPattern

KERNELS = {"2:4": "cuda_nm", "4:8": "cuda_nm", "unstructured": "cuda_unstructured"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
ROTATE_BYTES = 200_000_000


def graph_us(products: list[Callable[[], Any]], replays: int = 11, warm_seconds: float = 0.02) -> float:
    """Median microseconds of one product, from replays of a graph of all of them."""
    products[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for product in products:
            product()
    # Right after other work the clocks are still on the move.
    begun = time.perf_counter()
    while time.perf_counter() - begun < warm_seconds:
        graph.replay()
        torch.cuda.synchronize()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(products))
    return statistics.median(times)


def driver_version() -> str | None:
    """Of the GPU's driver, such as "580.159.04"."""
    if (smi := shutil.which("nvidia-smi")) is None:
        return None
    command = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]  # noqa: S603


def copies_of(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    nbytes = sum(t.numel() * t.element_size() for t in tensors.values())
    count = min(ROTATE_BYTES // max(nbytes, 1) + 2, 256)
    return [tensors, *({name: t.clone() for name, t in tensors.items()} for _ in range(count - 1))]


def repeated(products: list[Callable[[], Any]]) -> list[Callable[[], Any]]:
    return products * max(1, -(-12 // len(products)))


def dense_times(weight: Tensor, x: Tensor, bias: Tensor, copies: list[dict[str, Tensor]]) -> tuple[float, float]:
    """(torch ``F.linear``, the fastest dense way at hand) in µs."""
    linear = graph_us(repeated([lambda w=c["w"]: F.linear(x, w, bias) for c in copies]))
    others = [linear]
    if x.shape[0] == 1:
        others.append(graph_us(repeated([lambda w=c["w"]: torch.addmv(bias, w, x[0]) for c in copies])))
    else:
        others.append(graph_us(repeated([lambda w=c["w"]: torch.addmm(bias[:, None], w, x.T) for c in copies])))
    return linear, min(others)


def measure(models: list[str], rows_list: list[int], patterns: list[str], dtypes: list[str]) -> Iterator[dict[str, Any]]:
    for dtype_name in dtypes:
        dtype = DTYPES[dtype_name]
        for model in models:
            for layer in LAYERS:
                n, k = shape_of(model, layer)
                bias = torch.randn(n, device="cuda", dtype=dtype)
                inputs = {m: torch.randn(m, k, device="cuda", dtype=dtype) for m in rows_list}
                dense: dict[int, tuple[float, float]] = {}
                copies = copies_of({"w": torch.randn(n, k, device="cuda", dtype=dtype) * 0.02})
                for m, x in inputs.items():
                    dense[m] = dense_times(copies[0]["w"], x, bias, copies)
                del copies
                for name in patterns:
                    packed = random_packed((n, k), SparsityPattern.parse(PATTERNS[name]), dtype, "cuda")
                    unpacked = formats.get(packed.format).unpack(packed)
                    kernel = registry.get(KERNELS[name])
                    layouts = copies_of(dict(kernel.prepare(packed)))
                    nbytes = sum(t.numel() * t.element_size() for t in layouts[0].values())
                    for m, x in inputs.items():
                        expected = x.double() @ unpacked.double().T + bias.double()
                        error = float((kernel.run(x, layouts[0], bias, packed.pattern) - expected).norm() / expected.norm())
                        calls = [lambda held=held, x=x: kernel.run(x, held, bias, packed.pattern) for held in layouts]  # noqa: B023
                        us = graph_us(repeated(calls))
                        yield {
                            "model": model,
                            "layer": layer,
                            "n": n,
                            "k": k,
                            "m": m,
                            "pattern": name,
                            "values": dtype_name,
                            "kernel": kernel.name,
                            "us": round(us, 3),
                            "dense_us": round(dense[m][0], 3),
                            "best_dense_us": round(dense[m][1], 3),
                            "cusparselt_us": None,
                            "gb_per_s": round(nbytes / us / 1e3, 1),
                            "tflops": round(2e-6 * m * n * k / us, 2),
                            "limit_share": None,
                            "rel_error": error,
                        }
                    del layouts, unpacked
                torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=HIDDEN, default=list(HIDDEN))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=list(PATTERNS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--commit", help="recorded instead of what git says, where the checkout has no history")
    parser.add_argument("--out", type=Path, help="folder that gets linear-decode.json (default: bench/results/<device>)")
    settings = parser.parse_args()
    if reason := cuda.why_unavailable():
        print(f"this bench {reason}", file=sys.stderr)  # noqa: T201
        return 2
    torch.manual_seed(0)
    environment = reporting.environment()
    environment["commit"] = settings.commit or environment["commit"]
    environment["cuda"] = torch.version.cuda
    environment["driver"] = driver_version()
    device = reporting.device_name()
    if settings.out:
        reporting.RESULTS, device = settings.out.parent.resolve(), settings.out.name
    rows = []
    for row in measure(settings.models, settings.rows, settings.patterns, settings.dtypes):
        rows.append(row)
        speed = f"{row['us']:8.2f} us {row['dense_us'] / row['us']:5.2f}x dense {row['gb_per_s']:7.0f} GB/s"
        print(f"{row['model']:9} {row['layer']:4} m {row['m']:4} {row['pattern']:12} {row['values']} {speed}", flush=True)  # noqa: T201
        reporting.write_results(device, "linear-decode", environment, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

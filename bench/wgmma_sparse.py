"""How fast sparse wgmma runs on a Hopper GPU: operand A from registers or shared memory, held or loaded.

python bench/wgmma_sparse.py --out bench/results/h200/wgmma-sparse.json

A row is one form: clocks per m64nNk32 instruction of one multiprocessor (the least is N / 2), and dense-equivalent TFLOP/s of the whole
GPU at the clocks that it held.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import statistics
from pathlib import Path
from typing import Any

import torch

from sparse_engine import cuda
from sparse_engine.backends.cuda_decode import gpu
from sparse_engine.bench.environment import environment, write_json

A_FROM = ("registers", "shared memory", "registers, loaded from shared memory", "registers, loaded from L2")
QUADS = 1 << 19
STEPS = 1 << 14


class Params(ctypes.Structure):
    """``Params`` of csrc/cuda/prefill_rate.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("data", "clocks", "sink")),
        *((name, ctypes.c_int) for name in ("quads", "steps")),
    )


def measure(n: int, groups: int, a_from: int) -> dict[str, Any]:
    """One form, the median of five launches behind a warm-up."""
    here = gpu(0)
    macros = {"N_TILES": n // 8, "GROUPS": groups, "A_FROM": a_from}
    function = cuda.load("prefill_rate.cu", "prefill_rate", here.arch, tuple(sorted(macros.items())))
    data = torch.randn(QUADS * 8 + 65536, device="cuda").to(torch.bfloat16)
    clocks = torch.empty(here.processors, dtype=torch.int64, device="cuda")
    sink = torch.empty(128 * groups, device="cuda")
    params = Params(data.data_ptr(), clocks.data_ptr(), sink.data_ptr(), QUADS, STEPS)
    shared = 2 * n * 128 + groups * 8192
    per_step, milliseconds = [], []
    for _ in range(6):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        cuda.launch(function, (here.processors, 1), 128 * groups, shared, params, 0)
        end.record()
        end.synchronize()
        per_step.append(float(clocks.double().mean()) / STEPS / groups)
        milliseconds.append(start.elapsed_time(end))
    flops = 2.0 * 64 * n * 32 * STEPS * groups * here.processors
    instruction, ms = statistics.median(per_step[1:]), statistics.median(milliseconds[1:])
    return {
        "n": n,
        "warpgroups": groups,
        "a": A_FROM[a_from],
        "clocks_per_instruction": round(instruction, 1),
        "of_twice_dense": round(n / 2 / instruction, 3),
        "tflops": round(flops / ms / 1e9, 1),
        "clock_mhz": round(instruction * STEPS * groups / ms / 1e3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    rows = []
    for n, a_from in itertools.product((64, 128, 256), range(len(A_FROM))):
        for groups in (1, 2, 3) if n == 128 else (1, 2):
            rows.append(measure(n, groups, a_from))
            print(rows[-1], flush=True)  # noqa: T201
    write_json(out, {"environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()

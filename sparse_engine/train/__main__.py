"""``accelerate launch -m sparse_engine.train JOB.json``: one process of a fine-tuning run that a study spreads over several."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from sparse_engine.data.pairs import load_pairs
from sparse_engine.errors import SparseEngineError
from sparse_engine.hf.loading import parse_dtype, quiet_transformers
from sparse_engine.progress import console_track
from sparse_engine.train.finetune import finetune
from sparse_engine.train.settings import FinetuneSettings


def main(path: str) -> int:
    """Run the job file; 0 when done, 2 when it cannot be done, with the reason on standard error."""
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    quiet_transformers()
    try:
        finetune(
            job["source"],
            Path(job["out"]),
            load_pairs(job["train"]),
            load_pairs(job["validation"]),
            FinetuneSettings.from_dict(job["settings"]),
            teacher=job["teacher"],
            device=torch.device(job["device"]),
            dtype=parse_dtype(job["dtype"]),
            resume=True,
            overwrite=True,
            track=console_track,
        )
    except SparseEngineError as error:
        sys.stderr.write(f"sparse-engine: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

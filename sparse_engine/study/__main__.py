"""One process of a study that runs several at a time.

``python -m sparse_engine.study stage RECIPE OUT DEVICE ROW STAGE`` makes one stage, ``... evaluate RECIPE OUT DEVICE ROW...`` evaluates
rows whose checkpoints are there.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from sparse_engine.errors import SparseEngineError
from sparse_engine.hf.loading import quiet_transformers
from sparse_engine.progress import console_track
from sparse_engine.study.graph import Graph
from sparse_engine.study.parallel import find_stage
from sparse_engine.study.recipe import load_recipe
from sparse_engine.study.stages import Stages


def main(task: str, source: str, out: str, device: str, *names: str) -> int:
    """0 when done, 2 when it cannot be done, with the reason on standard error."""
    quiet_transformers()
    place = torch.device(device)
    try:
        graph = Graph(load_recipe(source), place.type)
        stages = Stages(graph, Path(out) / "stages", place, 1, console_track)
        if task == "stage":
            stages.ensure(find_stage(graph, *names))
        else:
            for name in names:
                stages.ensure(graph.evaluation(graph.recipe.rows[name]))
    except SparseEngineError as error:
        sys.stderr.write(f"sparse-engine: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

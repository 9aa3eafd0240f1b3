"""The engine on a tiny model under compute-sanitizer: no kernel of a generation reads or writes outside its tensors, or races."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import make_tiny_opt
from sanitizer import run_clean

from sparse_engine.engine.cuda import VARIABLE as STEP

GENERATE = """
import sys, torch
from sparse_engine import EngineOPTForCausalLM, SparseOPTForCausalLM

path, pattern = sys.argv[1:]
settings = {"dtype": torch.bfloat16}
if pattern == "dense":
    model = EngineOPTForCausalLM.from_pretrained(path, **settings)
elif pattern == "0.5":
    model = SparseOPTForCausalLM.from_pretrained(path, sparsity=0.5, **settings)
else:
    model = SparseOPTForCausalLM.from_pretrained(path, nm=pattern, **settings)
model = model.to("cuda").eval()
ids = torch.randint(4, 200, (5, 9), generator=torch.Generator().manual_seed(0)).cuda()
mask = torch.ones_like(ids)
mask[1, :4] = 0
for batch in (1, 5):
    for options in ({}, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}, {"do_sample": True, "top_k": 5}):
        given = {"input_ids": ids[:batch], "attention_mask": mask[:batch], "max_new_tokens": 4} | options
        assert model.generate(**({"do_sample": False} | given)).shape[0] == batch
        assert model.generation_path.startswith("engine"), model.generation_path
torch.cuda.synchronize()
print("generated")
"""


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize(
    ("pattern", "step"),
    [
        ("dense", "kernels"),
        ("2:4", "kernels"),
        ("0.5", "kernels"),
        ("2:4", "rows"),
        ("0.5", "rows"),
        ("2:4", "half-layers"),
        ("2:4", "one-kernel"),
    ],
)
def test_generation_is_clean(pattern: str, step: str, tool: str, tmp_path: Path) -> None:
    # The narrowest that every form of the step runs.
    sizes = {"hidden_size": 256, "word_embed_proj_dim": 256, "ffn_dim": 1024, "num_attention_heads": 4}
    path = make_tiny_opt(tmp_path / "opt", **sizes)
    kernels = ("decode", "attention", "embed", "greedy", "advance", "penalise", "layer_norm", "arrange", "expand", "half", "head")
    said = run_clean(tool, kernels, GENERATE, str(path), pattern, SPARSE_ENGINE_GENERATE="engine", **{STEP: step})
    assert "generated" in said

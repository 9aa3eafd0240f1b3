"""Makes the fixtures beside this file with the real library: `pip install --no-deps compressed-tensors==0.14.0.1 loguru`, then run it.

Each folder is a tiny OPT checkpoint as compressed-tensors 0.14 wrote it; expected.tensors holds its masked dense linears.
"""

from __future__ import annotations

from pathlib import Path

import torch
from compressed_tensors import ModelCompressor
from compressed_tensors.config import BitmaskConfig, Sparse24BitMaskConfig
from safetensors.torch import save_file
from transformers import OPTConfig, OPTForCausalLM

HERE = Path(__file__).parent
SIZES = {"vocab_size": 40, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 1}


def make(name: str, config: Sparse24BitMaskConfig | BitmaskConfig, two_four: bool) -> None:
    torch.manual_seed(1)
    model = OPTForCausalLM(OPTConfig(**SIZES, num_attention_heads=2, max_position_embeddings=32)).to(torch.bfloat16)
    expected = {}
    for linear, module in model.model.decoder.layers.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        weight = module.weight.data
        if two_four:
            kept = weight.float().abs().view(-1, 4).topk(2, -1).indices
            mask = torch.zeros(weight.numel() // 4, 4, dtype=torch.bool).scatter_(1, kept, True).view_as(weight)
        else:
            mask = torch.rand(weight.shape) < 0.4
        weight.mul_(mask)
        weight[0, :8] = 0  # whole groups without a non-zero weight
        expected[f"model.decoder.layers.{linear}"] = weight.clone()
    compressor = ModelCompressor(sparsity_config=config)
    state = compressor.compress(model, dict(model.state_dict()))
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    state.pop("lm_head.weight", None)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = ["OPTForCausalLM"]
    model.config.save_pretrained(folder)
    compressor.update_config(folder)
    save_file(expected, folder / "expected.tensors")


make("sparse-24-bitmask", Sparse24BitMaskConfig(targets=["Linear"], ignore=["lm_head"]), two_four=True)
make("sparse-bitmask", BitmaskConfig(targets=["Linear"], ignore=["lm_head"]), two_four=False)

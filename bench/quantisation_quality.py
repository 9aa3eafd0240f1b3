"""Perplexity and size after quantising the kept values of a pruned model, against the same model with its own type of values.

The checkpoint is pruned once by `sparse-engine convert`, and the packed result quantised by it; each is then loaded in float32. The
perplexity is over whole held-out documents cut to --length tokens; the calibration text is other text of the same kind. It is taken
of the forward over a whole document; of the bfloat16 forward as the GPU's kernels for 8-bit values run it, whose activations become
levels of the weights' type with a scale for each token (known ahead where e4m3 ones are left behind a ReLU); and, on a processor, of
the decode step token by token, where activations that meet int8 and int4 weights are rounded to int8 too, with the output head as it is
and as int8.

    python bench/quantisation_quality.py --model $SPARSE_ENGINE_DATA/models/base-28m
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from reporting import device_name, environment, quality_options, write_results
from torch import Tensor, nn
from transformers import AutoTokenizer

from sparse_engine import SparseLinear, SparseOPTForCausalLM, formats, value_types
from sparse_engine.checkpoint import Checkpoint
from sparse_engine.convert import convert
from sparse_engine.data.calibration import calibration_tokens
from sparse_engine.data.files import read_documents
from sparse_engine.engine.cpu import int8_head, objection
from sparse_engine.engine.native_step import Decoder, Description
from sparse_engine.evaluate.perplexity import document_perplexity
from sparse_engine.levels import LARGEST, TokenLevels, levels_of_rows, relu_bound
from sparse_engine.pattern import SparsityPattern


def main() -> None:
    parser = quality_options(__doc__, documents=10, samples=32)
    parser.add_argument("--pruner", default="sparsegpt")
    parser.add_argument("--patterns", nargs="*", default=["2:4"])
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
                row = {"model": settings.model.name, "pruner": settings.pruner, "pattern": pattern}
                row["values"] = name if name != value_types.PLAIN else str(next(iter(layers.values())).dtype).removeprefix("torch.")
                row["packed_linear_nbytes"] = linear_nbytes(out)
                ways: dict[tuple[str, str], Any] = {("forward", "float32"): model}
                if settings.device == "cpu" and objection(model) is None:
                    ways["decode step", "float32"] = Stepwise(model, None, settings.length)
                    ways["decode step", "int8"] = Stepwise(model, int8_head(model.lm_head.weight), settings.length)
                if (levelled := as_on_gpu(out, settings.device)) is not None:
                    ways["forward as on a GPU", "bfloat16"] = levelled
                for (path, head), way in ways.items():
                    measured = document_perplexity(way, documents, settings.length)
                    results.append(row | {"path": path, "head": head, "perplexity": measured.ppl, "tokens": measured.tokens})
                    print(results[-1], flush=True)  # noqa: T201
    write_results(device_name(), "quantisation-quality", environment(), results)


def as_on_gpu(path: Path, device: str) -> Any | None:
    """The bfloat16 model whose packed linears multiply as the GPU's kernels do, or None where those expand the values."""
    model = SparseOPTForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(device)
    for name, module in list(model.named_modules()):
        if isinstance(module, SparseLinear) and module.value_type != value_types.PLAIN:
            if value_types.get(module.value_type).element(module.dtype) not in LARGEST:
                return None
            model.set_submodule(name, PerToken(module))
    for layer in model.model.decoder.layers:
        if isinstance(layer.fc1, PerToken) and isinstance(layer.fc2, PerToken) and layer.fc1.element is torch.float8_e4m3fn:
            layer.fc1.leave_levels_to(layer.fc2)
    return model


class PerToken(nn.Module):
    """A linear of 8-bit values: levels of each token times levels of each row, the sum times both scales, plus the bias.

    Sums of int8 are exact here as there; those of fp8 are float32, where tensor cores keep fewer bits.
    """

    def __init__(self, layer: SparseLinear) -> None:
        super().__init__()
        packed = layer.packed
        self.scales, self.element, self.bias = packed.tensors["scales"], packed.tensors["values"].dtype, layer.bias
        ones = dict(packed.tensors) | {"scales": torch.ones_like(self.scales)}
        levels = formats.get(packed.format).unpack(replace(packed, tensors=ones, dtype=torch.float32))
        self.levels = levels.double() if self.element is torch.int8 else levels
        self.bound: Tensor | None = None
        self.follower: list[PerToken] = []  # in a list, it is no part of this module
        self.given: TokenLevels | None = None

    def leave_levels_to(self, follower: PerToken) -> None:
        """Behind the ReLU of this layer, ``follower`` multiplies levels that this one has left by scales known ahead."""
        norm = (self.levels.norm(dim=1) * self.scales).max().reshape(1)
        self.bound, self.follower = relu_bound(norm, self.bias), [follower]

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        tokens = self.given or levels_of_rows(flat, self.element, self.bound)
        self.given = None
        sums = tokens.values.to(self.levels.dtype) @ self.levels.T
        y = sums.float() * (tokens.scales[: len(flat), None] * self.scales)
        y = y if self.bias is None else y + self.bias.float()
        if tokens.ahead is not None:
            levels = (y.relu() * tokens.ahead[1, : len(flat), None]).clamp_max(LARGEST[self.element]).to(self.element)
            self.follower[0].given = TokenLevels(levels, tokens.ahead[0], x.dtype)
        return y.to(x.dtype).view(*x.shape[:-1], -1)


class Stepwise:
    """A model whose logits come from the native decode step, one token after the other."""

    device = torch.device("cpu")

    def __init__(self, model: Any, head: Mapping[str, Tensor] | None, slots: int) -> None:
        self.description = Description(model, head=head)
        self.decoder = Decoder(self.description, 1, slots)
        described = self.description
        shape = (described.layers, 1, described.heads, slots, described.hidden // described.heads)
        self.keys, self.values = torch.zeros(shape), torch.zeros(shape)

    def __call__(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        start = torch.zeros(1, dtype=torch.int64)
        steps = [self.decoder.step(token, start, start + i, self.keys, self.values) for i, token in enumerate(input_ids.T)]
        return SimpleNamespace(logits=torch.stack(steps, 1))


def linear_nbytes(path: Path) -> int:
    """Bytes of the packed linears' weights in a checkpoint, biases left out."""
    checkpoint = Checkpoint(path)
    stored = (name.rpartition(".") for name in checkpoint.names())
    return sum(
        checkpoint.tensor_nbytes(f"{name}.{part}") for name, _, part in stored if name in checkpoint.packed_layers and part != "bias"
    )


if __name__ == "__main__":
    main()

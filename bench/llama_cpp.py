"""llama.cpp beside the engine: a dense model of an OPT's shape with random weights for it, and what its own llama-bench measures on it.

llama.cpp does not know OPT. GPT-2, which it does, has the same matrices, biases, norms and learnt positions, and GELU for ReLU, so a
step reads the same bytes and does the same sums. The head is the token embedding, as in OPT.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparse_engine.bench.models import opt_config
from sparse_engine.errors import InputError

__all__ = ["VALUES", "LlamaCpp"]

VALUES = ("bf16", "q8_0")
"""Types of the matrices: 16 bits, and 8 bits with an fp16 scale for every 32."""

_SPREAD = 0.02


def _tensors(config: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, (out_features, in_features) of matrices."""
    hidden, inner = config.hidden_size, config.ffn_dim
    yield "token_embd.weight", (config.vocab_size, hidden)
    yield "position_embd.weight", (config.max_position_embeddings, hidden)
    for name in ("weight", "bias"):
        yield f"output_norm.{name}", (hidden,)
    for i in range(config.num_hidden_layers):
        for norm in ("attn_norm", "ffn_norm"):
            for name in ("weight", "bias"):
                yield f"blk.{i}.{norm}.{name}", (hidden,)
        attention = (("attn_qkv", 3 * hidden, hidden), ("attn_output", hidden, hidden))
        for linear, rows, columns in (*attention, ("ffn_up", inner, hidden), ("ffn_down", hidden, inner)):
            yield f"blk.{i}.{linear}.weight", (rows, columns)
            yield f"blk.{i}.{linear}.bias", (rows,)


@dataclass(frozen=True)
class LlamaCpp:
    """A model file, and the program that measures it."""

    program: Path
    model: Path
    nbytes: int
    """Of the matrices that every token reads."""

    @classmethod
    def make(cls, program: Path, model: str, values: str, folder: Path) -> LlamaCpp:
        """Write the model file to ``folder``.

        Raises:
            InputError: the gguf package is missing, or ``values`` is none of :data:`VALUES`.
        """
        try:
            import gguf
        except ImportError:
            raise InputError("a model file for llama.cpp is written by the gguf package: pip install gguf") from None
        if values not in VALUES:
            raise InputError(f"llama.cpp is measured with {' and '.join(VALUES)} values, not {values}")
        kind = gguf.GGMLQuantizationType[values.upper()]
        config, random = opt_config(model), np.random.default_rng(0)
        path = folder / f"{model}-{values}.gguf"
        writer = gguf.GGUFWriter(path, "gpt2")
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.ffn_dim)
        writer.add_head_count(config.num_attention_heads)
        writer.add_layer_norm_eps(1e-5)
        writer.add_vocab_size(config.vocab_size)
        writer.add_tokenizer_model("none")
        nbytes = 0
        for name, shape in _tensors(config):
            weight: NDArray[Any] = (random.standard_normal(shape, dtype=np.float32) * _SPREAD).astype(np.float32)
            if len(shape) == 1 or name == "position_embd.weight":
                writer.add_tensor(name, weight + 1 if name.endswith("norm.weight") else weight)
            else:
                quantised = gguf.quants.quantize(weight, kind)
                nbytes += quantised.nbytes
                writer.add_tensor(name, quantised, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return cls(program, path, nbytes)

    def _run(self, threads: int, *tests: str) -> dict[str, Any]:
        command = [str(self.program), "-m", str(self.model), "-t", str(threads), "-r", "1", "-o", "json", *tests]
        try:
            run = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        except OSError as error:
            raise InputError(f"{self.program} cannot be run: {error.strerror or error}") from None
        if run.returncode != 0:
            raise InputError(f"{self.program} failed with status {run.returncode}: {run.stderr.strip()[-500:]}")
        (result,) = json.loads(run.stdout)
        return dict(result)

    def prompt_seconds(self, tokens: int, threads: int) -> float:
        """Of a pass of ``tokens``, after one that warms up."""
        return float(self._run(threads, "-p", str(tokens), "-n", "0")["avg_ns"]) * 1e-9

    def token_seconds(self, prompt: int, tokens: int, threads: int) -> float:
        """Of one of ``tokens`` steps behind a prompt."""
        return float(self._run(threads, "-p", "0", "-n", str(tokens), "-d", str(prompt))["avg_ns"]) * 1e-9 / tokens

    def build(self) -> str:
        """What the program says about its version."""
        run = subprocess.run([str(self.program), "--version"], capture_output=True, text=True, check=False)  # noqa: S603
        return " ".join((run.stdout + run.stderr).split())

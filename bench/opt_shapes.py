"""The linear layers of the OPT models, by model and layer: (out_features, in_features)."""

from __future__ import annotations

HIDDEN = {
    "opt-125m": 768,
    "opt-350m": 1024,
    "opt-1.3b": 2048,
    "opt-2.7b": 2560,
    "opt-6.7b": 4096,
    "opt-13b": 5120,
    "opt-30b": 7168,
    "opt-66b": 9216,
}
LAYERS = {"out": (1, 1), "qkv": (3, 1), "fc1": (4, 1), "fc2": (1, 4)}
PATTERNS = {"2:4": "2:4", "4:8": "4:8", "unstructured": "0.5"}
"""What the results call a pattern, and how it is parsed."""


def shape(model: str, layer: str) -> tuple[int, int]:
    out, inner = LAYERS[layer]
    return HIDDEN[model] * out, HIDDEN[model] * inner

"""How good a model is: perplexity and ROUGE."""

from __future__ import annotations

from sparse_engine.evaluate.perplexity import Perplexity, document_perplexity, window_perplexity
from sparse_engine.evaluate.rouge import Rouge, rouge

__all__ = ["Perplexity", "Rouge", "document_perplexity", "rouge", "window_perplexity"]

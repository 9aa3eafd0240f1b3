"""The choice of the next token and what follows from it on the device (csrc/cuda/sample.cu).

Order and meaning are those of transformers' processors: repetition penalty, n-gram ban, temperature, top-k, top-p, all in float32.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_engine.engine.kernels import launching
from sparse_engine.engine.kernels.embed import Embedding, EmbeddingParams, embed_reference
from sparse_engine.engine.kernels.layernorm import row_macros
from sparse_engine.errors import InputError

__all__ = ["DecodeState", "StateParams", "advance", "greedy", "penalise", "sample"]

_SPLITS = 8
"""Blocks of the cluster that shares a row of logits."""
_THREADS = 512
_CHUNK = 4096
"""Logits that a block of the penalties copies."""


def macros_of(logits: torch.dtype | None, embedding: Embedding | None, *, chunk: bool = False) -> dict[str, int]:
    """What csrc/cuda/sample.cu is compiled with for logits of a type, or tokens chosen elsewhere (None); ``chunk`` for the penalties."""
    width, element = (embedding.width, embedding.tokens.dtype) if embedding is not None else (8, torch.float32)
    macros = row_macros(width, element, least_threads=_THREADS if logits is not None else 32)
    macros["LOGITS"] = launching.ELEMENT[logits or torch.float32]
    return {**macros, "CHUNK": _CHUNK} if chunk else macros


@dataclass(frozen=True, slots=True)
class DecodeState:
    """Where each row of a batch stands; every step reads and updates these tensors in place, on one device.

    ``tokens`` (B,) int64: the token that enters the next step. ``lengths`` (B,) int32: tokens in the row's cache, which is the position
    of ``tokens[b]``. ``history`` (B, S) int64 and ``filled`` (B,) int32: history[b, :filled[b]] is what transformers calls input_ids,
    padding on the left included, so that penalties see the same. ``limits`` (B,) int32: a row finishes when filled reaches it
    (at most S). ``finished`` (B,) bool. ``eos`` (K,) int64, K ≥ 0; ``pad`` is the token that finished rows feed.
    """

    tokens: Tensor
    lengths: Tensor
    history: Tensor
    filled: Tensor
    limits: Tensor
    finished: Tensor
    eos: Tensor
    pad: int

    def check(self, batch: int) -> None:
        """Refuse tensors that the kernels could not read.

        Raises:
            InputError: shapes, types or devices do not fit.
        """
        rows, device = (batch,), self.history.device
        expected: list[tuple[str, Tensor, tuple[int, ...], torch.dtype]] = [
            ("tokens", self.tokens, rows, torch.int64),
            ("lengths", self.lengths, rows, torch.int32),
        ]
        expected += [("filled", self.filled, rows, torch.int32), ("limits", self.limits, rows, torch.int32)]
        expected += [("finished", self.finished, rows, torch.bool), ("eos", self.eos, tuple(self.eos.shape[:1]), torch.int64)]
        expected.append(("history", self.history, (batch, *self.history.shape[1:2]), torch.int64))
        for name, tensor, shape, dtype in expected:
            launching.check(name, tensor, shape, dtype, device)


class StateParams(ctypes.Structure):
    """``State`` of csrc/cuda/advance.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("tokens", "lengths", "history", "filled", "limits", "finished", "eos")),
        ("pad", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in ("history_size", "eos_count")),
    )

    @classmethod
    def of(cls, state: DecodeState) -> StateParams:
        tensors = (state.tokens, state.lengths, state.history, state.filled, state.limits, state.finished, state.eos)
        return cls(*(t.data_ptr() for t in tensors), state.pad, state.history.shape[1], state.eos.numel())


class _Params(ctypes.Structure):
    """``Params`` of csrc/cuda/sample.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "chosen")),
        ("state", StateParams),
        *((name, ctypes.c_int) for name in ("vocabulary", "has_embedding")),
        ("embedding", EmbeddingParams),
    )


class _PenaltyParams(ctypes.Structure):
    """``PenaltyParams`` of csrc/cuda/sample.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "history", "filled", "scores")),
        *((name, ctypes.c_int) for name in ("vocabulary", "capacity", "ngram")),
        ("penalty", ctypes.c_float),
    )


def _advance_reference(state: DecodeState, chosen: Tensor, embedding: Embedding | None) -> None:
    going = ~state.finished
    token = torch.where(going, chosen, state.pad)
    rows = going.nonzero().flatten()
    state.history[rows, state.filled[rows].long()] = token[rows]
    state.filled.add_(going)
    state.lengths.add_(going)
    state.tokens.copy_(token)
    state.finished.logical_or_(going & (torch.isin(token, state.eos) | (state.filled >= state.limits)))
    if embedding is not None:
        embed_reference(state.tokens, state.lengths, embedding)


def _launch(state: DecodeState, logits: Tensor | None, chosen: Tensor | None, embedding: Embedding | None) -> None:
    batch, device = state.tokens.numel(), state.history.device
    if not batch:
        return
    table = embedding.tokens if embedding is not None else None
    if table is not None and table.device != device:
        raise InputError(f"the embedding lies on {table.device} and the state on {device}; move them to one device")
    params = _Params(
        logits.data_ptr() if logits is not None else None,
        chosen.data_ptr() if chosen is not None else None,
        StateParams.of(state),
        logits.shape[1] if logits is not None else 0,
        int(embedding is not None),
        embedding.params() if embedding is not None else EmbeddingParams(),
    )
    macros = macros_of(logits.dtype if logits is not None else None, embedding)
    splits = _SPLITS if logits is not None and launching.gpu(device.index).hopper else 1
    function = "greedy" if logits is not None else "advance"
    launching.run("sample.cu", function, macros, (batch, splits), macros["THREADS"], params, device, cluster=splits)


def advance(state: DecodeState, chosen: Tensor, embedding: Embedding | None = None) -> None:
    """Take ``chosen`` (B,) int64 as the next tokens, and embed them for the next step where ``embedding`` is given.

    Of a row that goes on: history[filled] = tokens = the chosen one, filled and lengths grow by one, and the row finishes at an EOS token
    or at its limit. A finished row feeds ``pad`` and stays where it is. After a prompt of P tokens was run, lengths[b] must be P - 1 when
    its first token is taken.

    Raises:
        InputError: shapes, types or devices do not fit.
        KernelUnavailableError: the kernel cannot be compiled or launched.
    """
    batch = state.tokens.numel()
    state.check(batch)
    launching.check("chosen", chosen, (batch,), torch.int64, state.history.device)
    if embedding is not None:
        embedding.check(batch)
    if not chosen.is_cuda:
        _advance_reference(state, chosen, embedding)
        return
    _launch(state, None, chosen, embedding)


def greedy(logits: Tensor, state: DecodeState, embedding: Embedding | None = None) -> None:
    """Take the argmax of each row of ``logits`` (B, V), the first where several are equal, and `advance`: one launch for all of it.

    Raises:
        InputError: shapes, types or devices do not fit.
        KernelUnavailableError: the kernel cannot be compiled or launched.
    """
    batch = state.tokens.numel()
    if logits.dim() != 2 or logits.dtype not in launching.ELEMENT or not logits.shape[1]:
        raise InputError(f"logits are {logits.dtype} {tuple(logits.shape)}, expected float16, bfloat16 or float32 (B, V)")
    state.check(batch)
    launching.check("logits", logits, (batch, logits.shape[1]), logits.dtype, state.history.device)
    if embedding is not None:
        embedding.check(batch)
    if not logits.is_cuda:
        _advance_reference(state, logits.argmax(-1), embedding)
        return
    _launch(state, logits, None, embedding)


def _penalise_reference(logits: Tensor, history: Tensor, filled: Tensor, penalty: float, ngram: int, scores: Tensor) -> None:
    vocabulary = logits.shape[1]
    for b, count in enumerate(filled.tolist()):
        seen, row = history[b, :count], logits[b].float()
        known = seen[seen < vocabulary]
        scores[b] = row
        scores[b, known] = torch.where(row[known] < 0, row[known] * penalty, row[known] / penalty)
        if ngram and count >= ngram:
            windows = seen.unfold(0, ngram, 1)
            banned = windows[(windows[:, :-1] == seen[count + 1 - ngram :]).all(-1), -1]
            scores[b, banned[banned < vocabulary]] = -torch.inf


def penalise(
    logits: Tensor, history: Tensor, filled: Tensor, scores: Tensor, *, repetition_penalty: float = 1.0, no_repeat_ngram_size: int = 0
) -> None:
    """scores (B, V) float32 = ``logits`` (B, V) after the repetition penalty and the ban of repeated n-grams.

    A token in history[b, :filled[b]] has its score divided by ``repetition_penalty`` where it is positive and multiplied where it is
    negative; one that would complete an n-gram of ``no_repeat_ngram_size`` (0: none) that history holds becomes -inf.

    Raises:
        InputError: shapes, types or devices do not fit, or an option lies outside its range.
        KernelUnavailableError: the kernel cannot be compiled or launched.
    """
    if logits.dim() != 2 or logits.dtype not in launching.ELEMENT:
        raise InputError(f"logits are {logits.dtype} {tuple(logits.shape)}, expected float16, bfloat16 or float32 (B, V)")
    if not repetition_penalty > 0 or no_repeat_ngram_size < 0:
        raise InputError(
            f"repetition_penalty is {repetition_penalty} and no_repeat_ngram_size {no_repeat_ngram_size}; "
            "the first must be above 0 and the second 0 or more"
        )
    batch, vocabulary = logits.shape
    device = logits.device
    launching.check("logits", logits, (batch, vocabulary), logits.dtype, device)
    launching.check("scores", scores, (batch, vocabulary), torch.float32, device)
    launching.check("history", history, (batch, *history.shape[1:2]), torch.int64, device)
    launching.check("filled", filled, (batch,), torch.int32, device)
    if not logits.is_cuda:
        _penalise_reference(logits, history, filled, repetition_penalty, no_repeat_ngram_size, scores)
        return
    if not logits.numel():
        return
    pointers = (t.data_ptr() for t in (logits, history, filled, scores))
    params = _PenaltyParams(*pointers, vocabulary, history.shape[1], no_repeat_ngram_size, repetition_penalty)
    macros = macros_of(logits.dtype, None, chunk=True)
    launching.run("sample.cu", "penalise", macros, (batch, -(-vocabulary // _CHUNK)), _THREADS, params, device)


def sample(
    scores: Tensor,
    chosen: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> None:
    """Draw ``chosen`` (B,) int64 from softmax(``scores`` (B, V) float32 / temperature), kept to the ``top_k`` best (0: all) and then to
    the smallest set of probability ``top_p``.

    Torch operators without a wait for the device. In a CUDA graph, ``generator`` must be one that the graph knows
    (``CUDAGraph.register_generator_state``), or None for the device's default.

    Raises:
        InputError: an option lies outside its range.
    """
    if not temperature > 0 or top_k < 0 or not 0 < top_p <= 1:
        raise InputError(
            f"temperature {temperature}, top_k {top_k}, top_p {top_p}: temperature > 0, top_k >= 0 and 0 < top_p <= 1 are needed"
        )
    kept = warp(scores, temperature, top_k, top_p)
    # The largest of log p - log(exponential noise) is a draw from p (the Gumbel-max trick).
    noise = torch.empty_like(kept).exponential_(generator=generator)
    chosen.copy_((kept - noise.log()).argmax(-1))


def warp(scores: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """``scores`` (B, V) over the temperature, with -inf for what top-k and top-p leave out."""
    if temperature != 1.0:
        scores = scores / temperature
    if 0 < top_k < scores.shape[1]:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1.0:
        ascending, order = scores.sort()
        dropped = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        dropped[:, -1] = False
        scores = scores.masked_fill(dropped.scatter(1, order, dropped), -torch.inf)
    return scores

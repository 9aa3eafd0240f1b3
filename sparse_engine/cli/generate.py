"""``sparse-engine generate``: continue a prompt."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from sparse_engine.cli.app import app
from sparse_engine.cli.common import Backend, Device, Dtype, parse_device, seed_option
from sparse_engine.errors import InputError
from sparse_engine.hf.loading import load_model, load_tokenizer, parse_dtype


def _prompt(text: str | None, file: Path | None) -> str:
    if (text is None) == (file is None):
        raise InputError("give the prompt as --prompt TEXT or --prompt-file FILE, one of the two")
    if text is None:
        from sparse_engine.data.files import open_text

        assert file is not None
        with open_text(file) as stream:
            text = stream.read()
    if not text:
        raise InputError("the prompt is empty: give it some text to continue")
    return text


@app.command(epilog='Example: sparse-engine generate opt-125m-2of4 --prompt "A bill to" --max-new-tokens 64')
def generate(
    ckpt: Annotated[str, typer.Argument(metavar="CKPT", help="Packed or dense checkpoint: a directory or a Hub id.")],
    prompt: Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="Text to continue.")] = None,
    prompt_file: Annotated[Path | None, typer.Option("--prompt-file", metavar="FILE", help="UTF-8 file with the text to continue.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens to add.")] = 64,
    temperature: Annotated[float | None, typer.Option("--temperature", help="Sample at this temperature; default: greedy.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="Sample from the likeliest tokens that sum to this.")] = None,
    seed: Annotated[int, seed_option("Of the sampling.")] = 0,
    backend: Backend = None,
    dtype: Dtype = None,
    device: Device = "cpu",
) -> None:
    """Continue a prompt and print the new text; greedy unless --temperature or --top-p asks for sampling."""
    if temperature is not None and not 0 < temperature < math.inf:
        raise InputError(f"--temperature must be a number above 0, got {temperature}; leave it out for greedy decoding")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"--top-p must lie above 0 and at most at 1, got {top_p}")
    text = _prompt(prompt, prompt_file)
    stored, place = parse_dtype(dtype), parse_device(device)

    from transformers import GenerationConfig, TextStreamer

    from sparse_engine.checkpoint import resolve

    path = resolve(ckpt)
    tokenizer = load_tokenizer(path)
    model = load_model(path, backend=backend, dtype=stored, device=place)
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"].to(place)
    positions = model.config.max_position_embeddings
    if ids.shape[1] + max_new_tokens > positions:
        raise InputError(
            f"the prompt has {ids.shape[1]} tokens, which with {max_new_tokens} new ones exceeds the model's {positions} positions"
        )
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens,
        do_sample=temperature is not None or top_p is not None,
        temperature=1.0 if temperature is None else temperature,
        top_p=1.0 if top_p is None else top_p,
        top_k=0,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    torch.manual_seed(seed)
    started = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
    seconds = time.perf_counter() - started
    count = output.shape[1] - ids.shape[1]
    typer.echo(f"{count} tokens in {seconds:.2f} s ({count / seconds:.1f} tokens/s, prompt of {ids.shape[1]} included)", err=True)

"""Tiny OPT checkpoints, and the text that their tokenizer is made from."""

from __future__ import annotations

from pathlib import Path

import torch

# Words enough for the tiny tokenizer to learn merges from, and for calibration texts made of them.
TEXT = (
    "SECTION 1. SHORT TITLE. This Act may be cited as the Bridge Repair Act. SEC. 2. GRANTS. The Secretary shall make grants "
    "to States for the repair of bridges, and shall report to the Congress each year on the bridges repaired under this Act."
)


def make_tiny_opt(path: Path, **config: object) -> Path:
    """Write an OPT checkpoint of random fp32 weights (2 layers, hidden 64, ffn 128, 128 positions) with a tokenizer to ``path``.

    ``config`` overrides fields of OPTConfig. Special ids are OPT's: pad 1, bos and eos 2.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    roles = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **roles)
    fields: dict[str, object] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "ffn_dim": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 2,
    }
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig(**{**fields, **config}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    torch.random.set_rng_state(state)
    model.save_pretrained(path)
    fast.save_pretrained(path)
    return path

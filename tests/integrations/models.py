"""Tiny decoders with random weights, one of each family, and prompts for them."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import flex_tls as tls

VOCAB = 97

# Few enough tokens kept that every step of a 100-token context drops most of it
SPARSE = tls.TLSConfig(
    block_size=16, block_budget=48, token_budget=32, sink_tokens=4, recent_tokens=8, dense_layers=1,
    label_dims=8, label_bits=8,
)  # fmt: skip
# Budgets that hold every test's context
FULL = tls.TLSConfig(block_size=16, block_budget=512, token_budget=512, sink_tokens=4, recent_tokens=8, dense_layers=1)

_SIZES = {
    "vocab_size": VOCAB, "intermediate_size": 96, "num_hidden_layers": 3, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None, "initializer_range": 0.2,
}  # fmt: skip


def _heads(n: int, n_kv: int, head_dim: int = 16) -> dict[str, int]:
    return {"num_attention_heads": n, "num_key_value_heads": n_kv, "hidden_size": n * head_dim}


FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, _heads(4, 2)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, _heads(5, 1)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {**_heads(6, 2), "head_dim": 16}),
    "mistral": (MistralForCausalLM, MistralConfig, {**_heads(4, 4), "sliding_window": None}),
    "mistral, window": (MistralForCausalLM, MistralConfig, {**_heads(4, 2), "sliding_window": 40}),
    "qwen2, some windows": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {**_heads(4, 2), "use_sliding_window": True, "sliding_window": 40, "max_window_layers": 2},
    ),
}


def make(family: str = "llama") -> PreTrainedModel:
    """A model of the family, in evaluation mode, the same in every call."""
    torch.manual_seed(0)
    model_class, config_class, sizes = FAMILIES[family]
    model: PreTrainedModel = model_class(config_class(**_SIZES, **sizes)).eval()
    return model


def prompts(*lengths: int) -> dict[str, torch.Tensor]:
    """Random prompts of these lengths, padded on the left: input_ids and attention_mask [B, longest]."""
    longest = max(lengths)
    generator = torch.Generator().manual_seed(1)
    ids = torch.zeros(len(lengths), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, longest - length :] = torch.randint(2, VOCAB, (length,), generator=generator)
        mask[row, longest - length :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def tokenizer() -> PreTrainedTokenizerFast:
    """Tokens of one to three letters for all of the models' ids."""
    letters = [chr(ord("a") + i) for i in range(26)]
    words = letters + [a + b for a in "abcd" for b in letters[:9]] + [a + "e" + b for a in "abcde" for b in letters[:7]]
    plain = Tokenizer(token_models.WordLevel({word: i for i, word in enumerate(words[:VOCAB])}, unk_token="a"))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    plain.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="a")

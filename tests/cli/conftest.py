"""A model that the commands can load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A random Llama, and a tokenizer of single characters."""
    letters = sorted({chr(i) for i in range(32, 127)} | {"\n", "\t"})
    plain = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token=" "))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    folder = tmp_path / "model"
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token=" ").save_pretrained(folder)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(letters),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
        bos_token_id=None,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    return folder

"""Models of real sizes with random weights: times do not depend on what the weights say."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Sizes(NamedTuple):
    """Of a Qwen3 model."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


SIZES = {
    "qwen3-8b": Sizes(4096, 12288, 36, 32, 8, 128, 151936),
    "qwen3-14b": Sizes(5120, 17408, 40, 40, 8, 128, 151936),
    "tiny": Sizes(64, 96, 3, 6, 2, 16, 97),
}


def random_model(name: str, n_layers: int | None, device: torch.device) -> Any:
    """A decoder in evaluation mode, bfloat16 on CUDA; with fewer layers than the real one if ``n_layers`` says so."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    hidden, inner, layers, heads, kv_heads, head_dim, vocab = SIZES[name]
    config = Qwen3Config(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=n_layers or layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head_dim, vocab_size=vocab, max_position_embeddings=2**20,
        tie_word_embeddings=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def weight_bytes(model: Any) -> int:
    """Bytes of the weights that a step reads: all but the table of embeddings, of which it reads a row."""
    total: int = sum(x.numel() * x.element_size() for x in model.parameters())
    table = model.get_input_embeddings().weight
    return total - table.numel() * table.element_size()

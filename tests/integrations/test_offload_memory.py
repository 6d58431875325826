"""A prompt whose keys and values are twice what the GPU may take."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import flex_tls as tls
from tests.integrations.models import VOCAB
from tests.integrations.watched import generated

pytestmark = pytest.mark.cuda
# Weights 40 MiB, index 67 MiB, pools 64 MiB, pieces of the past 64 MiB; the rest is for a chunk's own work
ROOM_BYTES = 2**30
MAX_LEN, N_STEPS = 2**17, 12
CFG = tls.TLSConfig(block_budget=2048, token_budget=512, dense_layers=0)


@pytest.fixture
def limit_bytes() -> Iterator[int]:
    """What torch may take of the device: ``ROOM_BYTES`` more than other tests have left it with."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved() + ROOM_BYTES
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
    try:
        yield limit
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def long_model() -> LlamaForCausalLM:
    """16 KiB of keys and values a token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=1024, intermediate_size=256, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=MAX_LEN, pad_token_id=0, bos_token_id=1,
        eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()


def test_a_prompt_larger_than_the_free_memory_is_read_and_gone_on_from(limit_bytes: int) -> None:
    model = long_model()
    before = torch.cuda.memory_allocated()
    with pytest.raises(
        MemoryError, match=r"TLSCache: 2,217,750,576 bytes needed on cuda.* are free; max_len=\d+ is the longest"
    ):
        tls.TLSCache(model.config, CFG, max_len=MAX_LEN, dtype=torch.bfloat16, device="cuda")
    assert torch.cuda.memory_allocated() == before
    cache = tls.TLSCache(
        model.config, CFG, max_len=MAX_LEN, dtype=torch.bfloat16, device="cuda", offload=tls.OffloadConfig()
    )
    assert cache.host_nbytes == cache.kv_nbytes == 2 * ROOM_BYTES
    torch.cuda.reset_peak_memory_stats()
    n = MAX_LEN - N_STEPS - 1
    ids = torch.randint(2, VOCAB, (1, n), generator=torch.Generator().manual_seed(0)).cuda()
    tokens, logits = generated(model, cache, {"input_ids": ids}, N_STEPS)
    assert tokens.shape[1] == MAX_LEN
    assert bool(logits.isfinite().all())
    assert cache.seq_lens == [n + N_STEPS]
    assert torch.cuda.max_memory_reserved() <= limit_bytes
    for layer in cache.offloaded_layers:
        layer.opened().synchronize()
        layer.opened().check_integrity()
        # A prompt's last token and the last step's reached the host
        assert bool(layer.opened().store.keys[0, :, [n - 1, n + N_STEPS - 1]].abs().sum(-1).gt(0).all())
    cache.close()

"""Milliseconds of one decode step of a whole model, random weights in a real configuration.

Providers take turns over the same keys and values: ours with two levels, ours with every layer dense (in the same
compiled, captured step, by a kernel as fast as cuDNN's), and transformers' compiled static cache.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import flex_tls as tls
from flex_tls.decode import Loop
from flex_tls.integrations.huggingface import enabled

from .rows import Machine
from .timing import samples, spread

FIT_TOKENS = 8192
CHUNK_TOKENS = 16384
OURS = ("two_level", "dense")


def qwen3(name: str) -> Any:
    """Qwen3-8B's and Qwen3-14B's configurations; "tiny" for a dry run."""
    from transformers import Qwen3Config

    sizes = {
        "qwen3-8b": (4096, 12288, 36, 32, 8, 128, 151936),
        "qwen3-14b": (5120, 17408, 40, 40, 8, 128, 151936),
        "tiny": (64, 96, 3, 6, 2, 16, 97),
    }
    hidden, inner, layers, heads, kv_heads, head_dim, vocab = sizes[name]
    return Qwen3Config(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head_dim, vocab_size=vocab, max_position_embeddings=2**20,
        tie_word_embeddings=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip


def measure(
    model: Any, case: str, batch_size: int, context: int, providers: list[str], runs: int, machine: Machine, out: Path
) -> list[dict[str, Any]]:
    """Rows of one case, appended to ``out``."""
    device = next(model.parameters()).device
    cfg = tls.TLSConfig() if context > 2048 else tls.TLSConfig(block_budget=512, token_budget=256)
    room = context + 64
    cache = tls.TLSCache(model.config, cfg, batch_size=batch_size, max_len=room, dtype=model.dtype, device=device)
    _fill(cache, context)
    steps: dict[str, Callable[[], object]] = {}
    build_seconds: dict[str, float] = {}
    kept: list[object] = []
    for name in providers:
        start = time.perf_counter()
        if name in OURS:
            steps[name], keep = _ours(model, cache, name)
        else:
            steps[name], keep = _transformers(model, batch_size, context)
        kept.append(keep)
        build_seconds[name] = time.perf_counter() - start
    timed = samples(steps, device, runs)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    rows = []
    for name, taken in timed.items():
        s = spread(taken)
        rows.append({
            "bench": "decode", "case": case, "B": batch_size, "context": context, "provider": name,
            "block_budget": cfg.block_budget, "token_budget": cfg.token_budget, "dense_layers": cfg.dense_layers,
            "ms_median": s.median_us / 1e3, "ms_p10": s.p10_us / 1e3, "ms_p90": s.p90_us / 1e3,
            "ms_p99": sorted(taken)[min(len(taken) - 1, int(0.99 * len(taken)))] / 1e3, "runs": s.runs,
            "tokens_per_second": batch_size * 1e6 / s.median_us, "build_seconds": build_seconds[name],
            "peak_bytes_of_case": peak, **machine._asdict(),
        })  # fmt: skip
        print(f"{case} B={batch_size} {context}: {name} {s.median_us / 1e3:.3f} ms", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return rows


def _fill(cache: tls.TLSCache, context: int) -> None:
    """Random keys and values, as if ``context`` tokens had been read; a real prefill would take minutes of a run."""
    for layer in cache.tls_layers:
        keys, _ = (buffer.normal_() for buffer in layer.buffers())
        if layer.index is not None:
            labels = layer.index.labels
            layer.index.fit(keys[:, :, : min(FIT_TOKENS, context)])
            for first in range(0, context, CHUNK_TOKENS):
                tokens = slice(first, min(first + CHUNK_TOKENS, context))
                labels.codes[..., tokens] = labels.encode(keys[:, :, tokens])
    cache.advance(context)


def _ours(model: Any, cache: tls.TLSCache, name: str) -> tuple[Callable[[], object], object]:
    """One captured step; every replay decodes the same place of the context again."""
    if name != "two_level":
        dense = tls.TLSCache(
            model.config, dataclasses.replace(cache.cfg, dense_layers=model.config.num_hidden_layers),
            batch_size=cache.batch_size, max_len=cache.max_len,
        )  # fmt: skip
        for layer, shared in zip(dense.tls_layers, cache.tls_layers, strict=True):
            layer.keys, layer.values, layer.is_initialized = shared.keys, shared.values, True
        dense.advance(cache.get_seq_length())
        cache = dense
    ids = torch.zeros(cache.batch_size, 1, dtype=torch.int64, device=next(model.parameters()).device)
    loop = Loop(model, cache, ids)
    loop.start.copy_(torch.tensor(cache.seq_lens))
    with torch.no_grad(), enabled(model):
        replay = loop.build(sparse=name == "two_level")

    def step() -> None:
        if loop.token.is_cuda:
            replay()
        else:
            # Nothing is captured: the model itself runs
            with torch.no_grad(), enabled(model):
                replay()
        loop.start -= 1

    return step, (loop, cache)


def _transformers(model: Any, batch_size: int, context: int) -> tuple[Callable[[], object], object]:
    """What transformers offers: static cache, ``torch.compile(mode="reduce-overhead")``, sdpa."""
    from transformers import StaticCache

    device = next(model.parameters()).device
    cache = StaticCache(config=model.config, max_cache_len=context + 64)
    forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    token = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
    position = torch.full((batch_size, 1), context, dtype=torch.int64, device=device)

    def step() -> None:
        with torch.no_grad():
            forward(token, position_ids=position, past_key_values=cache, use_cache=True)

    for _ in range(3):
        step()
    return step, cache

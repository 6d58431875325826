"""What a small pool costs in quality: hit rates and KL against no offload, per policy, on real weights and text.

By the backend "reference" on a GPU too: pools of many sizes would each be compiled for longer than their steps take.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flex_tls as tls
from flex_tls.cli.texts import library_source
from flex_tls.integrations.huggingface import enabled

# Provider -> policy, whether the blocks of earlier steps are attended to, and what the host holds after the prompt
PROVIDERS: dict[str, dict[str, Any]] = {
    "exact": {"policy": "exact"},
    "exact_int8": {"policy": "exact", "store_dtype": "int8"},
    "async": {"policy": "async"},
    "async_int8": {"policy": "async", "store_dtype": "int8"},
    "async_selected": {"policy": "async", "attend_resident": False},
    "corrected": {"policy": "corrected"},
    "corrected_selected": {"policy": "corrected", "attend_resident": False},
    "async_balanced": {"policy": "async"},
}
BALANCED = "async_balanced"
TEXTS = ("code", "copy", "manual", "later code", "other code")


def texts(tokenizer: Any, n: int, scored: int) -> dict[str, Tensor]:
    """Token ids int64 [1, n] of :data:`TEXTS`: the standard library's source, and a passage of it that comes again.

    Then Python's manual, later source, and the source of ``_pydecimal``, which the first text has nothing of.
    """
    import _pydecimal
    import pydoc_data.topics

    def ids(text: str) -> Tensor:
        found: Tensor = tokenizer(text, return_tensors="pt").input_ids
        return found

    code, manual = ids(library_source()), ids("\n".join(pydoc_data.topics.topics.values())[: 8 * n])
    made = {
        "code": code[:, 4000 : 4000 + n],
        "copy": torch.cat([code[:, : n - scored], code[:, 700 : 700 + scored]], 1),
        "manual": manual[:, :n],
        "later code": code[:, -n:],
        "other code": ids(inspect.getsource(_pydecimal)[: 8 * n])[:, :n],
    }
    for name, text in made.items():
        if text.shape[1] != n:
            raise ValueError(f"tokens: expected at most {text.shape[1]}, what {name!r} has, got {n}")
    return made


def measure(
    model: Any, name: str, text: str, ids: Tensor, n_score: int, cfg: tls.TLSConfig, pools: list[float],
    providers: list[str], balanced: dict[float, tuple[int, ...]],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Rows of one text: ids int64 [1, S], the last ``n_score`` tokens teacher-forced; pools in block budgets.

    ``balanced``: slots of each layer, by pool, that another text's misses gave; noted here where there are none yet.
    """
    n = ids.shape[1] - n_score
    device, given = model.device, dict(balanced)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompt"
        dense = tls.TLSCache(
            model.config, cfg, max_len=ids.shape[1], dtype=model.dtype, device=device, backend="reference",
            offload=tls.OffloadConfig(policy="exact"),
        )  # fmt: skip
        with enabled(model):
            for first in range(0, n, 2048):
                model(ids[:, first : min(first + 2048, n)], past_key_values=dense, logits_to_keep=1)
        dense.save(path)
        plain = tls.TLSCache.load(path, model.config, device=device, backend="reference")
        truth = _forced(model, plain, ids, n)
        whole = _dense(plain, model, ids, n)
        for pool in pools:
            slots = max(int(pool * cfg.kept_blocks), cfg.kept_blocks + 2)
            for provider in providers:
                sizes: int | tuple[int, ...] = slots
                if provider == BALANCED:
                    if pool not in given:
                        continue
                    sizes = given[pool]
                offload = tls.OffloadConfig(gpu_blocks=sizes, **PROVIDERS[provider])
                cache = tls.TLSCache.load(path, model.config, device=device, backend="reference", offload=offload)
                logits = _forced(model, cache, ids, n)
                stats = list(cache.stats().values())
                mean = lambda field, stats=stats: sum(getattr(x, field) for x in stats) / len(stats)  # noqa: E731
                if provider == "async":
                    balanced.setdefault(pool, cache.balanced_gpu_blocks())
                yield {
                    "bench": "offload_quality", "model": name, "text": text, "context": n, "scored": n_score,
                    "provider": provider, "pool_over_budget": slots / cfg.kept_blocks, "block_size": cfg.block_size,
                    "block_budget": cfg.block_budget, "token_budget": cfg.token_budget,
                    "hit_rate": mean("hit_rate"), "worst_hit_rate": min(x.hit_rate for x in stats),
                    "missing_mass": mean("missing_mass"), "waits": mean("waits"),
                    "stall_us": mean("stall_us"),
                    "kl_to_no_offload": _kl(truth, logits), "kl_dense_to_this": _kl(whole, logits),
                    "kl_dense_to_no_offload": _kl(whole, truth),
                    "agreement": float((truth.argmax(-1) == logits.argmax(-1)).float().mean()),
                }  # fmt: skip
                cache.close()


def _forced(model: Any, cache: tls.TLSCache, ids: Tensor, n: int) -> Tensor:
    """Log-probabilities [scored - 1, V] after each forced token, float64 on the CPU."""
    with enabled(model):
        steps = (model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(n, ids.shape[1] - 1))
        out = [logits[0, -1].double().cpu() for logits in steps]
    return torch.stack(out).log_softmax(-1)


def _dense(cache: tls.TLSCache, model: Any, ids: Tensor, n: int) -> Tensor:
    """The same without two levels, over the same keys and values."""
    cache.crop(n)
    with _budgets_that_hold_all(cache):
        return _forced(model, cache, ids, n)


@contextmanager
def _budgets_that_hold_all(cache: tls.TLSCache) -> Iterator[None]:
    cfg = cache._shared.cfg
    cache._shared.configure(
        tls.TLSConfig(block_size=cfg.block_size, block_budget=2**30, token_budget=None, dense_layers=cfg.dense_layers)
    )
    try:
        yield
    finally:
        cache._shared.configure(cfg)


def _kl(p: Tensor, q: Tensor) -> float:
    return float((p.exp() * (p - q)).sum(-1).mean())

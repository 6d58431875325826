"""A decoder of one's own with two-level attention: FlexAttention, our masks, and an index a layer.

Run it: ``python examples/own_model.py``. The weights are random; what matters is where the index is built, appended to
and asked. On CUDA the whole step compiles into one graph; on CPU FlexAttention alone does (its C++ template wants the
selection made before).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from flex_tls.masks import block_mask, fold_groups, token_score_mod, unfold_groups
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

import flex_tls as tls

# Once: every layer and every step then shares one compilation
compiled_flex = torch.compile(flex_attention, dynamic=False)


@dataclass(frozen=True)
class Sizes:
    """A model's sizes; ``heads / kv_heads`` may be any whole number."""

    vocab: int = 512
    width: int = 256
    inner: int = 512
    layers: int = 4
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 32


@dataclass
class LayerCache:
    """Keys and values [B, HKV, S, D] of a layer, and their index. A module's own attributes would be compiled in."""

    keys: Tensor
    values: Tensor
    index: tls.KVIndex


class Block(nn.Module):
    """Grouped-query attention, dense over the prompt and two-level for every token after it, and a gated MLP."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.qkv = nn.Linear(sizes.width, (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim, bias=False)
        self.out = nn.Linear(sizes.heads * sizes.head_dim, sizes.width, bias=False)
        self.up = nn.Linear(sizes.width, 2 * sizes.inner, bias=False)
        self.down = nn.Linear(sizes.inner, sizes.width, bias=False)
        self.before, self.between = nn.RMSNorm(sizes.width), nn.RMSNorm(sizes.width)

    def project(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From x [B, T, width] at position [T]: q [B, HQ, T, D], k and v [B, HKV, T, D]."""
        heads, kv_heads = self.sizes.heads, self.sizes.kv_heads
        qkv = self.qkv(self.before(x)).unflatten(-1, (-1, self.sizes.head_dim)).transpose(1, 2)
        q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
        return rotate(q, position), rotate(k, position), v

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The block's output [B, T, width] from its input and its heads' output [B, HQ, T, D]."""
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        gate, up = self.up(self.between(x)).chunk(2, dim=-1)
        out: Tensor = x + self.down(F.silu(gate) * up)
        return out

    def read(self, x: Tensor, position: Tensor, cfg: tls.TLSConfig, capacity: int) -> tuple[Tensor, LayerCache]:
        """The prompt: attend causally, allocate the cache, build the index from the prompt's keys and queries."""
        q, k, v = self.project(x, position)
        keys, values = (F.pad(new, (0, 0, 0, capacity - new.shape[2])) for new in (k, v))
        index = tls.KVIndex.build(k, cfg, q=q, capacity_tokens=capacity)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.finish(x, attended), LayerCache(keys, values, index)

    def step(self, x: Tensor, position: Tensor, cfg: tls.TLSConfig, cache: LayerCache) -> Tensor:
        """One token: append its key, choose blocks and tokens, attend to them."""
        q, k, v = self.project(x, position)
        cache.keys.index_copy_(2, position, k)
        cache.values.index_copy_(2, position, v)
        cache.index.append(k)
        blocks = tls.select_blocks(q, cache.index, cfg)
        tokens = tls.select_tokens(q, cache.index, blocks, cfg)
        attended = compiled_flex(
            fold_groups(q, self.sizes.kv_heads), cache.keys, cache.values,
            score_mod=token_score_mod(tokens), block_mask=block_mask(blocks),
        )  # fmt: skip
        return self.finish(x, unfold_groups(attended, blocks.group))


class Decoder(nn.Module):
    """A small language model that decodes greedily."""

    def __init__(self, sizes: Sizes, cfg: tls.TLSConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(sizes.vocab, sizes.width)
        self.blocks: Any = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.head = nn.Sequential(nn.RMSNorm(sizes.width), nn.Linear(sizes.width, sizes.vocab, bias=False))

    def read(self, ids: Tensor, capacity: int) -> tuple[Tensor, list[LayerCache]]:
        """Prompt ids int64 [B, S] -> next tokens int64 [B, 1], and every layer's cache."""
        x, position, caches = self.embed(ids), torch.arange(ids.shape[1], device=ids.device), []
        for block in self.blocks:
            x, cache = block.read(x, position, self.cfg, capacity)
            caches.append(cache)
        return self.head(x[:, -1:]).argmax(-1), caches

    def step(self, token: Tensor, position: Tensor, caches: list[LayerCache]) -> Tensor:
        """Tokens int64 [B, 1] at position int64 [1] -> next tokens int64 [B, 1]."""
        x = self.embed(token)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block.step(x, position, self.cfg, cache)
        next_token: Tensor = self.head(x).argmax(-1)
        return next_token

    @torch.no_grad()
    def generate(self, ids: Tensor, n: int) -> Tensor:
        """Greedy continuation int64 [B, n] of ids int64 [B, S]."""
        step = torch.compile(self.step, fullgraph=True) if ids.is_cuda else self.step
        token, caches = self.read(ids, ids.shape[1] + n)
        tokens = [token]
        for t in range(n - 1):
            tokens.append(step(tokens[-1], torch.tensor([ids.shape[1] + t], device=ids.device), caches))
        return torch.cat(tokens, 1)


def rotate(x: Tensor, position: Tensor) -> Tensor:
    """Rotary position embedding of x [B, H, T, D]."""
    half = x.shape[-1] // 2
    angle = position[:, None] * 10000 ** (-torch.arange(half, device=x.device) / half)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1).to(x.dtype)


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    budgets = tls.TLSConfig(block_size=32, block_budget=1024, token_budget=512, recent_tokens=32)
    model = Decoder(Sizes(), budgets).eval().to(device)
    print(model.generate(torch.randint(0, 512, (1, 4000), device=device), 16).tolist())

"""What sparse decoding did: kept attention mass, selected blocks, locality, and bytes read.

For reports and pictures: set ``cache.recorder = Recorder()``, generate, read ``cache.recorder.result()``. Kept mass
needs the scores of the whole context, so a recorded step reads all keys; do not time recorded steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .index import KVIndex
from .mods import MaskMod, exact_scores
from .selection import BlockSelection, TokenSelection


@dataclass(frozen=True)
class Record:
    """What a :class:`Recorder` saw. Tensors are on the CPU; a layer is a key if it took at least one sparse step.

    Attributes:
        n_tokens: query tokens of all rows that were decoded, sparse or dense.
        n_blocks: N, blocks that the cache has room for.
        block_size: tokens per block.
        kept_mass: float32 [steps] of each layer: share of the full attention's weight that the selected tokens hold,
            mean over rows, query heads and query tokens.
        locality: float32 [steps - 1] of each layer: share of the blocks selected at a step that the previous step had
            selected too, over rows and KV heads.
        blocks: of each layer and step, int32 [B, HKV, K], blocks of the chunk's last query token, ascending; entries
            past a head's count hold N.
        tokens_per_head: mean number of tokens that a KV head attended to in a sparse step.
        kv_bytes_read_per_token: bytes of the kept blocks' keys and values, which the ``flex`` backend reads; layers
            that attended densely count in full.
        kv_bytes_selected_per_token: the same, counting the selected tokens alone.
        kv_bytes_dense_per_token: what full attention would have read.
        index_bytes_read_per_token: labels and summaries read to select.
    """

    n_tokens: int
    n_blocks: int
    block_size: int
    kept_mass: dict[int, Tensor]
    locality: dict[int, Tensor]
    blocks: dict[int, list[Tensor]] = field(repr=False)
    tokens_per_head: float
    kv_bytes_read_per_token: float
    kv_bytes_selected_per_token: float
    kv_bytes_dense_per_token: float
    index_bytes_read_per_token: float

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers with sparse steps, ascending."""
        return tuple(sorted(self.kept_mass))

    @property
    def mean_kept_mass(self) -> float:
        """Mean over layers and steps; NaN without a sparse step."""
        return _mean(self.kept_mass)

    @property
    def mean_locality(self) -> float:
        """Mean over layers and steps; NaN with fewer than two sparse steps."""
        return _mean(self.locality)

    def block_map(self, layer: int, row: int = 0) -> Tensor:
        """Float32 [steps, N]: share of the KV heads of ``row`` that selected a block."""
        steps = [_selected(ids[row], self.n_blocks).float().mean(0) for ids in self.blocks[layer]]
        return torch.stack(steps)


@dataclass
class _Layer:
    mass: list[Tensor] = field(default_factory=list)
    locality: list[Tensor] = field(default_factory=list)
    blocks: list[Tensor] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)
    kept_blocks: list[Tensor] = field(default_factory=list)


class Recorder:
    """Collects steps of a :class:`flex_tls.TLSCache`. Nothing is brought to the host before :meth:`result`."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything recorded so far."""
        self._layers: dict[int, _Layer] = {}
        self._n_blocks = 0
        self._block_size = 0
        self._n_tokens = 0
        self._token_bytes: dict[int, int] = {}
        self._dense_bytes = 0
        self._full_bytes = 0
        self._index_bytes = 0.0

    def count_tokens(self, n_tokens: int) -> None:
        """Note that a decode step of ``n_tokens`` query tokens, rows together, begins. Called by the cache."""
        self._n_tokens += n_tokens

    def add_dense(self, n_tokens: int, token_bytes: int) -> None:
        """Note that a layer attended densely. ``n_tokens``: tokens read, rows and queries together.

        ``token_bytes``: bytes of one token's keys and values, KV heads together.
        """
        self._dense_bytes += n_tokens * token_bytes
        self._full_bytes += n_tokens * token_bytes

    def add_sparse(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        index: KVIndex,
        blocks: BlockSelection,
        tokens: TokenSelection,
        *,
        n_tokens: int,
        scale: float,
        mask_mod: MaskMod | None = None,
    ) -> None:
        """Note a sparse step of one layer. q [B, HQ, T, D], k [B, HKV, S, D]; ``n_tokens`` as in :meth:`add_dense`."""
        if self._n_blocks not in (0, blocks.n_blocks) or self._block_size not in (0, blocks.block_size):
            raise ValueError(
                f"recorder: expected steps of one cache, {self._n_blocks} blocks of {self._block_size} tokens, got "
                f"{blocks.n_blocks} of {blocks.block_size}; use a new Recorder for another cache"
            )
        self._n_blocks, self._block_size = blocks.n_blocks, blocks.block_size
        seen = self._layers.setdefault(layer, _Layer())
        seen.mass.append(kept_mass(q, k, tokens, scale=scale, mask_mod=mask_mod).mean())
        ids = blocks.indices[:, :, -1].clone()
        if seen.blocks and seen.blocks[-1].shape == ids.shape:
            now, before = _selected(ids, blocks.n_blocks), _selected(seen.blocks[-1], blocks.n_blocks)
            seen.locality.append((now & before).sum() / now.sum().clamp_min(1))
        seen.blocks.append(ids)
        seen.tokens.append(tokens.counts.sum())
        seen.kept_blocks.append(blocks.counts.sum())
        # Per KV head, as selections are
        head_bytes = 2 * k.shape[-1] * k.element_size()
        self._token_bytes[layer] = head_bytes
        self._full_bytes += n_tokens * k.shape[1] * head_bytes
        self._index_bytes += n_tokens * k.shape[1] * index.bytes_per_token

    def result(self) -> Record:
        """Everything recorded so far. Synchronises with the device."""
        read = selected = float(self._dense_bytes)
        n_selected, n_heads = 0, 0
        for layer, seen in self._layers.items():
            layer_tokens = int(torch.stack(seen.tokens).sum())
            n_selected += layer_tokens
            n_heads += sum(ids.shape[0] * ids.shape[1] for ids in seen.blocks)
            selected += layer_tokens * self._token_bytes[layer]
            read += int(torch.stack(seen.kept_blocks).sum()) * self._block_size * self._token_bytes[layer]
        per = max(self._n_tokens, 1)
        return Record(
            n_tokens=self._n_tokens,
            n_blocks=self._n_blocks,
            block_size=self._block_size,
            kept_mass={i: _stack(x.mass) for i, x in self._layers.items()},
            locality={i: _stack(x.locality) for i, x in self._layers.items()},
            blocks={i: [ids.cpu() for ids in x.blocks] for i, x in self._layers.items()},
            tokens_per_head=n_selected / n_heads if n_heads else float("nan"),
            kv_bytes_read_per_token=read / per,
            kv_bytes_selected_per_token=selected / per,
            kv_bytes_dense_per_token=self._full_bytes / per,
            index_bytes_read_per_token=self._index_bytes / per,
        )


def kept_mass(q: Tensor, k: Tensor, tokens: TokenSelection, *, scale: float, mask_mod: MaskMod | None = None) -> Tensor:
    """Share of full attention's weight that lies on the selected tokens: float32 [B, HQ, T], exp(lse - dense lse).

    q [B, HQ, T, D], k [B, HKV, S, D]. A query that may look nowhere has kept everything: 1.
    """
    s = k.shape[2]
    scores = exact_scores(q, k, tokens.positions, scale=scale, mask_mod=mask_mod)
    full = scores.logsumexp(-1)
    kept = scores.masked_fill(~tokens.mask[..., :s][:, :, None], -torch.inf).logsumexp(-1)
    # -inf minus -inf is NaN, where a padding query sees nothing
    return torch.where(full.isneginf(), 1.0, (kept - full).exp()).reshape(q.shape[:3])


def _selected(ids: Tensor, n_blocks: int) -> Tensor:
    """Block ids [..., K], padded with N -> bool [..., N]."""
    out = torch.zeros(*ids.shape[:-1], n_blocks + 1, dtype=torch.bool, device=ids.device)
    return out.scatter(-1, ids.long(), True)[..., :-1]


def _stack(values: list[Tensor]) -> Tensor:
    return torch.stack(values).float().cpu() if values else torch.zeros(0)


def _mean(values: dict[int, Tensor]) -> float:
    return float(torch.cat([torch.zeros(0), *values.values()]).mean())

"""Token labels: every key in a few quantised dimensions, so that ``label . query`` approximates ``key . query``.

Per row and KV head, from the prompt alone. With Ck the second moment of the centred keys and Cq that of the prompt's
queries, A A^T = Cq and V the leading eigenvectors of A^T Ck A, a token's label is (A V)^T (k - mean) and the query
becomes (A^-T V)^T q: the error is weighted by what queries ask. Without queries A = I, which is plain PCA.
With basis "channels" the columns are those of the identity instead: the channels c with the largest Cq[c,c] Ck[c,c].
Centring shifts all scores of one query by the same amount, which no ranking and no softmax sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import LabelBasis
from .device import why_not_here

# Of subspace iteration: what labels miss is then some .1 % more than the least. With 16, one head in a thousand missed
# over a tenth more, where the start lay across one of the directions; with 32 none of 80,000 (D = 24)
ROUNDS = 32


# A layer's keys, in pieces k [B, HKV, S', D] with their weight bool [B, S'], to be read more than once
Keys = Callable[[], Iterable[tuple[Tensor, Tensor]]]


@dataclass
class TokenLabels:
    """Labels of one layer. Buffers stay at their addresses; everything is written in place.

    Attributes:
        codes: int32 [B, HKV, W, S]: W words of 32 bits hold a token's channels, lowest bits first, so that neighbouring
            tokens lie side by side; or float32 [B, HKV, D, S] when ``words`` is None (exact keys).
        to_code, offset: float32 [B, HKV, D, C] and [B, HKV, C]; ``key @ to_code + offset``, rounded, is the code.
        to_query: float32 [B, HKV, D, C], applied to queries.
        low, step: float32 [B, HKV, C]; a channel's value is ``low + step * code``.
        query_sum: float32 [B, HKV, D, D], sum of q q^T over the queries seen so far.
        query_count: float32 [B], queries in that sum, per KV head.
        words: bits of a channel in each word; see :class:`flex_tls.TLSConfig`.
    """

    codes: Tensor
    to_code: Tensor
    offset: Tensor
    to_query: Tensor
    low: Tensor
    step: Tensor
    query_sum: Tensor
    query_count: Tensor
    words: tuple[int, ...] | None

    @classmethod
    def empty(
        cls, b: int, h: int, s: int, d: int, *, dims: int, words: tuple[int, ...] | None, device: torch.device
    ) -> TokenLabels:
        """Zeroed buffers for ``s`` tokens; ``words=None`` keeps exact float32 keys (C = D, identity projection)."""
        c = d if words is None else dims
        codes = (
            torch.zeros(b, h, d, s, device=device)
            if words is None
            else torch.zeros(b, h, len(words), s, dtype=torch.int32, device=device)
        )
        eye = torch.eye(d, c, device=device).expand(b, h, d, c)
        return cls(
            codes=codes,
            to_code=eye.clone(),
            offset=torch.zeros(b, h, c, device=device),
            to_query=eye.clone(),
            low=torch.zeros(b, h, c, device=device),
            step=torch.ones(b, h, c, device=device),
            query_sum=torch.zeros(b, h, d, d, device=device),
            query_count=torch.zeros(b, device=device),
            words=words,
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The buffers by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "words"}

    @property
    def levels(self) -> Tensor:
        """Float32 [C]: each channel's largest code. Filled where it is needed: no copy from the host."""
        assert self.words is not None
        device, c = self.low.device, self.low.shape[-1]
        return torch.cat([torch.full((32 // bits,), 2.0**bits - 1, device=device) for bits in self.words])[:c]

    def forget_queries(self) -> None:
        """Start the queries' second moment anew."""
        self.query_sum.zero_()
        self.query_count.zero_()

    def observe(self, q: Tensor, weight: Tensor) -> None:
        """Add queries q [B, HQ, T, D] to the second moment that the next fit will use. weight bool [B, T]."""
        b, hq, t, d = q.shape
        n_kv_heads = self.query_sum.shape[1]
        # Not times zero: padding may hold anything, NaN too
        rows = q.masked_fill(~weight[:, None, :, None], 0.0).reshape(b * n_kv_heads, hq // n_kv_heads * t, d)
        if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
            # Of numbers as they are, summed in float32: no float32 copy of a prompt's queries
            products = torch.bmm(rows.transpose(1, 2), rows, out_dtype=torch.float32)
        else:
            products = rows.float().transpose(1, 2) @ rows.float()
        self.query_sum += products.view(self.query_sum.shape)
        self.query_count += weight.sum(1) * (hq // n_kv_heads)

    def quantise(self, keys: Keys, center: Tensor, to_label: Tensor) -> None:
        """Take the projection ``to_label`` [B, HKV, D, C] of centred keys, and the range that it gives them."""
        low, high = torch.full_like(self.low, torch.inf), torch.full_like(self.low, -torch.inf)
        for k, weight in keys():
            labels = (k.float() - center[:, :, None]) @ to_label
            out_of_reach = ~weight[:, None, :, None]
            low = low.minimum(labels.masked_fill(out_of_reach, torch.inf).amin(2))
            high = high.maximum(labels.masked_fill(out_of_reach, -torch.inf).amax(2))
        self.low.copy_(low)
        bias = (center[:, :, None] @ to_label)[:, :, 0] + low
        # One token, or a channel without spread: any step does that float32 can resolve
        least = torch.finfo(torch.float32).eps * (bias.abs() + to_label.abs().amax(2))
        self.step.copy_(((high - low) / self.levels).maximum(least))
        self.to_code.copy_(to_label / self.step[:, :, None])
        self.offset.copy_(-bias / self.step)

    def encode(self, k: Tensor) -> Tensor:
        """Labels of keys k [B, HKV, T, D], as a slice of ``codes``: [B, HKV, W, T]."""
        if self.words is None:
            return k.float().transpose(-1, -2)
        codes = k.float() @ self.to_code + self.offset[:, :, None]
        codes = codes.round().clamp_min(0).minimum(self.levels).to(torch.int32)
        channels = [32 // bits for bits in self.words]
        if missing := sum(channels) - codes.shape[-1]:
            codes = F.pad(codes, (0, missing))
        # Channels share no bit: their sum is their union
        words = [
            (part << torch.arange(0, 32, bits, dtype=torch.int32, device=k.device)).sum(-1, dtype=torch.int32)
            for part, bits in zip(torch.split(codes, channels, -1), self.words, strict=True)  # type: ignore[no-untyped-call,unused-ignore]
        ]
        return torch.stack(words, -2)

    def write(self, k: Tensor, start: Tensor, counts: Tensor | None = None) -> None:
        """Label keys k [B, HKV, T, D] in slots ``start[b] + t``; of row b the first ``counts[b]``, all by default.

        start and counts int64 [B]. One kernel where it runs, and no host synchronisation; on a CPU ``counts`` take one.
        """
        if self.words is not None and k.is_cuda and why_not_here(k.device) is None:
            label_keys(k, start, counts, self.codes, self.to_code, self.offset, self.words)
            return
        codes = self.encode(k)
        position = start[:, None] + torch.arange(k.shape[2], device=k.device)
        if counts is None:
            self.codes.scatter_(3, position[:, None, None].expand(codes.shape), codes)
            return
        row, token = (torch.arange(k.shape[2], device=k.device) < counts[:, None]).nonzero(as_tuple=True)
        self.codes[row, :, :, position[row, token]] = codes[row, :, :, token]

    def ask(self, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What queries q [B, HKV, R, D] ask: float32 base [B, HKV, R, C], unit [B, HKV, R, 1], asked [B, HKV, R, C].

        Over any channels, codes c score ``base.sum() + unit * (asked . c)``; ``asked`` are whole numbers of 8 bits.
        """
        exact = q.float() @ self.to_query
        base = exact * self.low[:, :, None]
        exact = exact * self.step[:, :, None]
        unit = (exact.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
        asked = (exact / unit + 0.5).floor()
        # What rounding takes from a channel, given back for the middle code: scores err around the truth, not beside it
        return base + (exact - unit * asked) * (self.levels / 2), unit, asked

    def scores(self, q: Tensor, dims: int | None = None) -> Tensor:
        """Approximate ``q . (k - center)`` of every slot. q [B, HKV, R, D] -> float32 [B, HKV, R, S].

        ``dims``: leading channels that count, all by default. A query's channels are rounded to 8 bits: its part of the
        error is a tenth of the labels' own, and sums of integers are exact in any backend's order, ties included.
        Compiled, it goes channel by channel: Inductor makes one pass over the words of it, where a matrix product would
        first write every channel out as a float (2.5 times slower on a CPU; 8 times the index's bytes on a GPU). Eager,
        every channel would be several passes over the scores: there it is the matrix product, of the same integers.
        """
        if self.words is None:
            return q.float() @ self.codes
        base, unit, asked = self.ask(q)
        # Inductor stores what as_strided takes: else its C++ loop would divide and round again for every token
        asked = asked.as_strided(asked.shape, asked.stride())
        base = base[..., :dims].sum(-1, keepdim=True)
        n_channels = asked.shape[-1] if dims is None else min(dims, asked.shape[-1])
        # Sums of integers below 2**24, exact in float32 and faster than in int32
        if not torch.compiler.is_compiling():
            values = self.unpack(self.codes, n_channels)
            scores: Tensor = base + unit * (asked[..., :n_channels] @ values.to(torch.float32))
            return scores
        total = torch.zeros_like(base)
        channel = 0
        for word, bits in enumerate(self.words):
            for place in range(min(32 // bits, n_channels - channel)):
                value = (self.codes[:, :, word] >> (place * bits)) & (2**bits - 1)
                total = total + asked[..., channel, None] * value[:, :, None].to(torch.float32)
                channel += 1
        return base + unit * total

    def unpack(self, codes: Tensor, n_channels: int) -> Tensor:
        """The leading channels of codes [B, HKV, W, S], a number each: int32 [B, HKV, n_channels, S]."""
        assert self.words is not None
        channels: list[Tensor] = []
        n = 0
        for word, bits in zip(codes.unbind(2), self.words, strict=True):
            if n >= n_channels:
                break
            shift = torch.arange(0, 32, bits, dtype=torch.int32, device=codes.device)
            channels.append((word[:, :, None] >> shift[:, None]) & (2**bits - 1))
            n += 32 // bits
        return torch.cat(channels, 2)[:, :, :n_channels]


def fit(labels: Sequence[TokenLabels], keys: Sequence[Keys], basis: LabelBasis = "lowrank") -> None:
    """Choose projection and quantiser of several layers, of each from its keys and from the queries that it has seen.

    What a layer's few small matrices take is launches: those of all layers go through each step at once.
    """
    if labels[0].words is None:
        return
    moments = [_key_moment(each()) for each in keys]
    asked = [_moment(each.query_sum, each.query_count) for each in labels]
    to_label, to_query = _BASES[basis](
        torch.stack([moment for _, moment in moments]), torch.stack(asked), labels[0].low.shape[-1]
    )
    for i, (each, (center, _)) in enumerate(zip(labels, moments, strict=True)):
        each.to_query.copy_(to_query[i])
        each.quantise(keys[i], center, to_label[i])


@torch.library.custom_op("flex_tls::label_keys", mutates_args=("codes",))
def label_keys(
    k: Tensor, start: Tensor, counts: Tensor | None, codes: Tensor, to_code: Tensor, offset: Tensor, bits: list[int]
) -> None:
    """See :func:`flex_tls.kernels.label_keys.launch_label_keys`."""
    from .kernels.label_keys import launch_label_keys

    k = k if k.stride(-1) == 1 else k.contiguous()
    start, counts = start.contiguous(), None if counts is None else counts.contiguous()
    with torch.cuda.device_of(k):  # type: ignore[no-untyped-call,unused-ignore]
        launch_label_keys(k, start, counts, codes, to_code, offset, bits=tuple(bits))


def _key_moment(keys: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Mean [B, HKV, D] and second moment about it [B, HKV, D, D] of weighted keys, float32."""
    count = center = total = torch.empty(0)
    for k, weight in keys:
        out_of_reach = ~weight[:, None, :, None]
        k32, n = k.float().masked_fill(out_of_reach, 0.0), weight.sum(1).to(torch.float32)[:, None, None]
        mean = k32.sum(2) / n.clamp_min(1.0)
        centred = (k32 - mean[:, :, None]).masked_fill(out_of_reach, 0.0)
        moment = centred.transpose(-1, -2) @ centred
        if not count.numel():
            count, center, total = n, mean, moment
            continue
        # Chan, Golub, LeVeque 1979: moments about each piece's own mean, joined without cancellation
        both, shift = (count + n).clamp_min(1.0), mean - center
        total = total + moment + shift[..., None] * shift[:, :, None] * (count * n / both)[..., None]
        center, count = center + shift * (n / both), count + n
    assert count.numel()
    return center, total / count.clamp_min(1.0)[..., None]


def _moment(total: Tensor, count: Tensor) -> Tensor:
    """Second moment from a sum [B, HKV, D, D] of ``count`` [B] queries, shrunk towards isotropy when they are few."""
    d = total.shape[-1]
    count = count[:, None, None, None]
    moment = total / count.clamp_min(1.0)
    scale = moment.diagonal(dim1=-1, dim2=-2).mean(-1)[..., None, None]
    # As if D isotropic queries had been seen beside the real ones: a short prompt must not blind the index
    share = d / (count + d)
    return (1 - share) * moment + share * scale * torch.eye(d, device=total.device)


def _leading_directions(ck: Tensor, cq: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """(A V, A^-T V), both [..., D, n], of the keys' and the queries' second moments [..., D, D].

    Any A with A A^T = Cq gives the same labels; Cholesky's factor takes no eigenproblem.
    """
    root = _root(cq)
    lead = _leading(root.transpose(-1, -2) @ ck @ root, n)
    return root @ lead, torch.linalg.solve_triangular(root.transpose(-1, -2), lead, upper=True)


def _leading(moment: Tensor, n: int) -> Tensor:
    """Orthonormal [..., D, n]: nearly the leading eigenvectors of ``moment``, the heaviest first.

    By subspace iteration: cuSOLVER finds eigenvectors of one matrix at a time, a millisecond each. Every prefix of the
    columns iterates for itself, so that the leading channels are the best of their number too. In float64, where
    Cholesky's factor of the columns' products makes them orthonormal. Begins at random, always alike: no direction is
    out of reach then.
    """
    d = moment.shape[-1]
    random = torch.randn(d, n, dtype=torch.float64, device="cpu", generator=torch.Generator().manual_seed(0))
    mean = moment.diagonal(dim1=-1, dim2=-2).mean(-1)[..., None, None].double()
    m = moment.double() / mean.clamp_min(torch.finfo(torch.float32).tiny)
    # Fewer tokens than channels leave directions without any spread: the others must stay apart from them
    m = m + 1e-5 * torch.eye(d, dtype=torch.float64, device=m.device)
    columns = m @ random.to(m.device)
    for i in range(ROUNDS):
        factor = torch.linalg.cholesky_ex(columns.transpose(-1, -2) @ columns).L
        columns = torch.linalg.solve_triangular(factor, columns.transpose(-1, -2), upper=False).transpose(-1, -2)
        if i < ROUNDS - 1:
            columns = m @ columns
    return columns.to(moment.dtype)


def _heaviest_channels(ck: Tensor, cq: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Columns of the identity, twice [..., D, n], the heaviest channel first; without queries by the keys alone."""
    weight = ck.diagonal(dim1=-1, dim2=-2)
    asked = cq.diagonal(dim1=-1, dim2=-2)
    weight = weight * torch.where(asked.sum(-1, keepdim=True) > 0, asked, 1.0)
    channels = weight.sort(dim=-1, descending=True, stable=True).indices[..., :n]
    chosen = torch.eye(ck.shape[-1], device=ck.device)[channels].transpose(-1, -2)
    return chosen, chosen


def _root(moment: Tensor) -> Tensor:
    """Lower triangular A with A A^T = moment, of unit mean and no direction below 1e-4; I where no query was seen."""
    d = moment.shape[-1]
    eye = torch.eye(d, device=moment.device)
    trace = moment.diagonal(dim1=-1, dim2=-2).sum(-1)[..., None, None]
    unit = torch.where(trace > 0, moment / trace.clamp_min(torch.finfo(torch.float32).tiny) * d, eye)
    raised = unit + 1e-4 * eye
    # _ex: cholesky alone would wait for the device to say whether it failed, as after millions of nearly equal queries,
    # whose sum rounding makes indefinite: then each channel goes by itself
    root, failed = torch.linalg.cholesky_ex(raised)
    alone = raised.diagonal(dim1=-1, dim2=-2).clamp_min(1e-4).sqrt().diag_embed()
    return torch.where((failed > 0)[..., None, None], alone, root)


# From the moments of keys and queries and the number of channels to what keys and queries are multiplied with
_BASES: dict[LabelBasis, Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]] = {
    "lowrank": _leading_directions,
    "channels": _heaviest_channels,
}

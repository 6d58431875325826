"""FlexAttention over selections that are given: what is left when selecting costs nothing."""

from __future__ import annotations

from flex_tls.masks import block_mask

from ..cases import Case
from ..inputs import InputSet
from .flex import flex_calls
from .registry import Job, provider, tokens_of


@provider("flex_given_selection", "attention", splits=True)
def flex_given_selection(case: Case, sets: list[InputSet], split_kv: int | None) -> Job:
    """Attention alone, over every token of the given blocks."""
    calls = flex_calls(case, sets, [block_mask(i.blocks) for i in sets], split_kv)
    masks = [tokens_of(case, i.blocks.indices[:, :, 0]) for i in sets]
    return Job(calls, [*masks], case.kv_bytes(case.kept_blocks * case.block_size))


@provider("flex_given_tokens", "attention", splits=True)
def flex_given_tokens(case: Case, sets: list[InputSet], split_kv: int | None) -> Job:
    """Attention alone, over the given tokens of the given blocks: the second level as a ``score_mod`` gather."""
    calls = flex_calls(case, sets, [block_mask(i.blocks) for i in sets], split_kv, use_tokens=True)
    return Job(calls, [i.tokens.mask[:, :, 0] for i in sets], case.kv_bytes(case.token_budget))

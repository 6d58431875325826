"""Selections as FlexAttention masks: compose two-level attention into your own model through ``flex_attention``."""

from .blocks import block_mask
from .fold import fold_groups, unfold_groups
from .tokens import token_score_mod

__all__ = ["block_mask", "fold_groups", "token_score_mod", "unfold_groups"]

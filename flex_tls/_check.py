"""Checks of what callers pass in. Messages name the argument, what was expected, what came, and the fix."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def dtype_name(dtype: torch.dtype) -> str:
    """Without the module: bfloat16, float32, ...."""
    return str(dtype).removeprefix("torch.")


def check_tensor(
    name: str, x: object, shape: tuple[int | None, ...], letters: str, *, like: Tensor | None = None
) -> None:
    """Raise unless ``x`` is a floating-point tensor of ``shape`` (None: any), with ``like``'s dtype and device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor [{letters}], got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: expected a floating-point dtype, got {x.dtype}")
    if x.dim() != len(shape):
        raise ValueError(f"{name}: expected {len(shape)} dimensions [{letters}], got shape {tuple(x.shape)}")
    for letter, want, got in zip(letters.split(", "), shape, x.shape, strict=True):
        if want is not None and want != got:
            hint = "; pass un-repeated keys and values" if letter == "HKV" else ""
            raise ValueError(f"{name}: expected {want} for {letter} in [{letters}], got {got}{hint}")
    if like is not None and x.dtype != like.dtype:
        raise TypeError(f"{name}: expected dtype {like.dtype}, got {x.dtype}; cast one of them")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {x.device}; move one of them")


def check_seq_lens(seq_lens: Tensor | None, batch_size: int, longest: int, device: torch.device) -> Tensor:
    """Lengths as int64 [B] on ``device``; None means ``longest`` for every row. Synchronises with the device."""
    if seq_lens is None:
        seq_lens = torch.full((batch_size,), longest, dtype=torch.int64, device=device)
    if not isinstance(seq_lens, Tensor) or seq_lens.dtype not in (torch.int32, torch.int64):
        got = seq_lens.dtype if isinstance(seq_lens, Tensor) else type(seq_lens).__name__
        raise TypeError(f"seq_lens: expected an integer tensor [B], got {got}")
    if seq_lens.shape != (batch_size,):
        raise ValueError(f"seq_lens: expected shape ({batch_size},), one length a row, got {tuple(seq_lens.shape)}")
    lens = seq_lens.tolist()
    if min(lens) < 1:
        raise ValueError(f"seq_lens: expected at least 1 token in every row, got {lens}; drop empty sequences")
    if max(lens) > longest:
        raise ValueError(f"seq_lens: expected at most {longest} tokens, the keys' length, got {max(lens)}")
    return seq_lens.to(device=device, dtype=torch.int64)


def check_no_nan(name: str, x: Tensor, valid: Tensor, first: int = 0) -> None:
    """Raise if ``x`` [B, HKV, S, D] is not finite where ``valid`` [B, S]; names the first place, from ``first`` on."""
    bad = ~torch.isfinite(x).all(-1).transpose(1, 2) & valid[:, :, None]
    if bool(bad.any()):
        row, token, head = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"{name}: expected finite numbers, got NaN or infinity at row {row}, head {head}, token {first + token}; "
            "check the model's dtype (fp16 overflows) and the prompt's padding"
        )

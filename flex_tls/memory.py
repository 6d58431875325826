"""What a device can still give, and the longest length within it."""

from __future__ import annotations

from collections.abc import Callable

import torch


def free_bytes(device: torch.device) -> int | None:
    """Bytes that tensors could still take on a CUDA device, what torch holds idle included; None elsewhere.

    Within the share of the device that ``torch.cuda.set_per_process_memory_fraction`` leaves this process.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_allocated(device)
    # The one of these that takes no "cuda" without a number (torch 2.11)
    number = torch.cuda.current_device() if device.index is None else device.index
    share = torch.cuda.get_per_process_memory_fraction(number)
    return min(free + torch.cuda.memory_reserved(device) - held, int(share * total) - held)


def longest_that_fits(needed_bytes: Callable[[int], int], room_bytes: int, up_to: int) -> int:
    """Largest length n <= ``up_to`` with ``needed_bytes(n) <= room_bytes``; ``needed_bytes`` never falls. 0 if none."""
    fits, too_long = 0, up_to + 1
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if needed_bytes(middle) <= room_bytes:
            fits = middle
        else:
            too_long = middle
    return fits

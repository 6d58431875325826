"""How many of the slots that all layers have together each of them gets."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

# A layer's misses fall with about this power of its slots (docs/design.md, section 10)
STEEPNESS = 4.0


def balanced_slots(slots: Sequence[int], misses: Sequence[float], *, least: int, most: int) -> tuple[int, ...]:
    """As many slots in all as ``slots``, shared out so that one more would save every layer about as many misses.

    With misses of ``a * P ** -STEEPNESS`` that is P in proportion to ``a ** (1 / (STEEPNESS + 1))``, within the bounds;
    one slot after the other goes to the layer that has fewest for its weight. Ties: the lower layer.

    Args:
        slots: P of each layer, while its misses were counted.
        misses: share of the selected blocks that each layer missed; if all are 0, nothing changes.
        least, most: bounds of every P, which ``slots`` keep. Layers that missed nothing get the least.
    """
    if not any(misses):
        return tuple(slots)
    weights = [(m * p**STEEPNESS) ** (1 / (STEEPNESS + 1)) for p, m in zip(slots, misses, strict=True)]
    sizes = [least] * len(slots)
    queue = [((least + 1) / weight, layer) for layer, weight in enumerate(weights) if weight and least < most]
    heapq.heapify(queue)
    for _ in range(sum(slots) - sum(sizes)):
        if not queue:
            break
        _, layer = queue[0]
        sizes[layer] += 1
        if sizes[layer] < most:
            heapq.heapreplace(queue, ((sizes[layer] + 1) / weights[layer], layer))
        else:
            heapq.heappop(queue)
    return tuple(sizes)

"""One call as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WARM_UP = 2


def captured(
    call: Callable[[], None], state: Sequence[Tensor], generator: torch.Generator | None = None
) -> Callable[[], None]:
    """A function that replays ``call``, which reads and writes tensors at fixed addresses and returns nothing.

    ``call`` runs twice before it is recorded, on a stream of its own; what it did to ``state`` and to ``generator`` is
    taken back each time, so that the first replay is its first effect. Other things that it writes stay: a pool of
    block slots (offload) then holds what the first step selects.
    """
    kept = [x.clone() for x in state]
    randomness = None if generator is None else generator.get_state()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call,unused-ignore]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            call()
            for x, old in zip(state, kept, strict=True):
                x.copy_(old)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    if generator is not None and randomness is not None:
        generator.set_state(randomness)
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        call()
    replay: Callable[[], None] = graph.replay
    return replay

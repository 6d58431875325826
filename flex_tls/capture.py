"""One call as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

WARM_UP = 2


@cache
def _streams(device: int) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """(to warm up on, to capture on), for all calls: cuBLAS keeps memory of its own for every stream that it has met.

    PyTorch's own stream for captures is one for all devices.
    """
    warm_up, capture = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call,unused-ignore]
    return warm_up, capture


def captured(
    call: Callable[[], None], state: Sequence[Tensor], generator: torch.Generator | None = None,
    rejoin: Callable[[], None] = lambda: None,
) -> Callable[[], None]:  # fmt: skip
    """A function that replays ``call``, which reads and writes tensors at fixed addresses and returns nothing.

    ``call`` runs twice before it is recorded, on a stream of its own; what it did to ``state`` and to ``generator`` is
    taken back each time, so that the first replay is its first effect. Other things that it writes stay: a pool of
    block slots (offload) then holds what the first step selects.

    If it raises while it is recorded, ``rejoin`` joins the streams that it forked: a capture with a stream outside
    cannot end, and one that cannot end leaves this thread on its stream.
    """
    with torch.cuda.device(state[0].device):
        return _captured(call, state, generator, rejoin)


def _captured(
    call: Callable[[], None], state: Sequence[Tensor], generator: torch.Generator | None, rejoin: Callable[[], None]
) -> Callable[[], None]:
    kept = [x.clone() for x in state]
    randomness = None if generator is None else generator.get_state()
    side, capture = _streams(torch.cuda.current_device())
    side.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                try:
                    call()
                finally:
                    for x, old in zip(state, kept, strict=True):
                        x.copy_(old)
    finally:
        # Also what it did before it raised
        torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    if generator is not None and randomness is not None:
        generator.set_state(randomness)
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph, stream=capture):
        try:
            call()
        except BaseException:
            rejoin()
            raise
    # Before a capture begins PyTorch sets the generator's seed and offset, on the capture's stream; a replay sets them
    # on its own. Where others kept the device busy, the former came last: a step drew other tokens
    torch.cuda.current_stream().wait_stream(capture)
    replay: Callable[[], None] = graph.replay
    return replay

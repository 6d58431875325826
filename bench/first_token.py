"""Seconds until the compiled step's first token: ``tls.generate`` in a fresh process, without and with its caches.

``cold``: folders for Inductor's and Triton's caches that are empty; ``warm``: another process, the same folders. The
model is on the device when the clock starts; reading the prompt, compiling and capturing are in it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import flex_tls as tls
from flex_tls._check import dtype_name

from . import rows
from .decode import TUNED
from .models import random_model

OPTIONS: dict[str, dict[str, Any]] = {"": {}, "_tuned": TUNED}


class Clock:
    """A streamer that notes when it gets something: the prompt, the prompt's next token, that of the first step."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Note the time."""
        self.at.append(time.perf_counter())

    def end(self) -> None:
        """Nothing more."""


def measure(
    model_name: str, n_layers: int | None, device: str, batch_size: int, context: int, cfg: tls.TLSConfig,
    options: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """What a row says of one call in this process, which must not have compiled anything."""
    model = random_model(model_name, n_layers, torch.device(device))
    cache = tls.TLSCache(
        model.config, cfg, batch_size=batch_size, max_len=context + 2, dtype=model.dtype, device=device
    )
    ids = torch.randint(0, model.config.vocab_size, (batch_size, context), device=device)
    clock = Clock()
    start = time.perf_counter()
    tls.generate(
        model, ids, cache=cache, max_new_tokens=2, streamer=clock, compiled=True, inductor_options=options,
        progress=True,
    )  # fmt: skip
    prompt, step = (at - start for at in clock.at[1:])
    return {
        "n_layers": model.config.num_hidden_layers, "dtype": dtype_name(model.dtype),
        "prompt_seconds": prompt, "seconds": step,
    }  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Measure cold and warm for every batch size and context, and append their rows."""
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: no CUDA device here; pass --device cpu --model tiny for a dry run")
    machine = rows.machine(device, args.commit, args.dirty)
    suffix = "_tuned" if args.tuned else ""
    for b in args.batch:
        for context in args.contexts:
            asked = (args.model, args.layers, args.device, b, context, args.block_budget, args.token_budget, suffix)
            with tempfile.TemporaryDirectory() as folder:
                for name in ("cold", "warm"):
                    row = rows.FirstTokenRow(
                        bench="first-token", case=args.model, B=b, provider=f"{name}{suffix}", context=context,
                        block_budget=args.block_budget, token_budget=args.token_budget, **machine._asdict(),
                        **_in_fresh_process(json.dumps(asked), Path(folder)),
                    )  # fmt: skip
                    rows.append(args.out, [row])
                    print(
                        f"{args.model} B={b} {context} tokens, {row.provider}: {row.seconds:.1f} s, "
                        f"of which the prompt {row.prompt_seconds:.1f}", flush=True,
                    )  # fmt: skip
    return 0


def _in_fresh_process(asked: str, caches: Path) -> dict[str, Any]:
    folders = {"TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"), "TRITON_CACHE_DIR": str(caches / "triton")}
    done = subprocess.run(
        [sys.executable, "-m", "bench.first_token", asked], cwd=rows.ROOT, env={**os.environ, **folders},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    if done.returncode:
        raise ValueError(f"first-token: the measuring process ended with {done.returncode} (trace above)")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _child(asked: str) -> None:
    name, n_layers, device, b, context, block_budget, token_budget, suffix = json.loads(asked)
    cfg = tls.TLSConfig(block_budget=block_budget, token_budget=token_budget)
    print(json.dumps(measure(name, n_layers, device, b, context, cfg, OPTIONS[suffix])))


if __name__ == "__main__":
    _child(sys.argv[1])

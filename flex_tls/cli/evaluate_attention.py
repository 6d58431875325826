"""``flex-tls eval attention``: what selections catch of full attention, by layer and head."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import torch
import typer
from rich.console import Console

from ..evaluate import rows
from ..evaluate.methods import cost
from ..evaluate.probe import probe_documents
from ..evaluate.summary import summarise_attention
from ..model_config import read_model_config
from .evaluate_common import (
    BackendName,
    BlockBudgets,
    Column,
    Commit,
    Dataset,
    Device,
    Documents,
    Dtype,
    JsonFile,
    Methods,
    ModelName,
    RowsFile,
    Split,
    Texts,
    TokenBudgets,
    as_backend,
    check_positions,
    chosen_methods,
    load_for_rows,
    progress_bar,
    read_texts,
    write_summary,
)
from .options import BLOCK_SIZE, BlockSize
from .report import print_attention, reported


def attention(
    files: Texts = None,
    dataset: Dataset = None,
    split: Split = "train",
    text_column: Column = "text",
    model_name: ModelName = None,
    context_tokens: Annotated[int, typer.Option(min=2, help="Tokens before the first decoded one.")] = 2048,
    score_tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode in each document.")] = 64,
    documents: Documents = 4,
    methods: Methods = "ours",
    block_budget: BlockBudgets = "1/4",
    token_budget: TokenBudgets = "1/8",
    block_size: BlockSize = BLOCK_SIZE,
    batch: Annotated[int, typer.Option(min=1, help="Documents decoded side by side.")] = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
    backend: BackendName = "auto",
    out: RowsFile = None,
    commit: Commit = None,
    json_file: JsonFile = None,
) -> None:
    """Attention mass and heavy tokens on the kept blocks and tokens, and how much selections change between tokens.

    Heavy are the fewest tokens that hold 90 % of a query head's attention. Every step reads all keys.
    """
    console = Console()
    length = context_tokens + score_tokens
    with reported(console):
        options = (block_budget, token_budget, block_size, console)
        chosen = [m for m in chosen_methods(methods, context_tokens, length, *options) if m.cfg and not m.evicts]
        if not chosen:
            raise ValueError(f"methods: expected one that selects among cached tokens, got {methods}")
        model, tokenizer, origin = load_for_rows(model_name, device, dtype, backend, commit, console)
        check_positions(model, length)
        texts = read_texts(files, dataset, split, text_column, tokenizer, length, documents)
        seen = {row.key: row for row in (rows.read(out) if out else []) if isinstance(row, rows.AttentionRow)}
        found: list[rows.AttentionRow] = []
        groups = [texts[start : start + batch] for start in range(0, len(texts), batch)]
        with progress_bar(console, len(groups) * len(chosen)) as advance:
            for group in groups:
                ids = torch.tensor([x.token_ids for x in group], device=model.device)
                for method in chosen:
                    keys = [
                        (*rows.key_of(origin, "attention", x.digest, method.name, method.config), str(context_tokens))
                        for x in group
                    ]
                    if any(key not in seen for key in keys):
                        ran_on, catches = probe_documents(
                            model, ids, context_tokens, method, backend=as_backend(backend)
                        )
                        shares = cost(method, read_model_config(model.config).head_dim, context_tokens)
                        new = [
                            rows.AttentionRow(
                                eval="attention", **asdict(origin), method=method.name, config=method.config,
                                backend=ran_on, **shares._asdict(), digest=text.digest, document=text.name,
                                context_tokens=context_tokens, score_tokens=score_tokens, **catch._asdict(),
                            )
                            for text, catch in zip(group, catches, strict=True)
                        ]  # fmt: skip
                        new = [row for row in new if row.key not in seen]
                        if out is not None:
                            rows.append(out, new)
                        seen |= {row.key: row for row in new}
                    found += [seen[key] for key in keys]
                    advance(method.name)
        lines = summarise_attention(found)
    print_attention(lines, console)
    write_summary(json_file, lines)

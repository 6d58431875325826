"""Real long text that every machine has: the source of Python's standard library."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

# Large, pure Python, and in every version from 3.10 on
MODULES = ("argparse", "subprocess", "typing", "inspect", "tarfile", "doctest")
QUESTION = "Explain briefly what the first module above does and how a program uses it."


def library_source() -> str:
    """The modules' sources, one after the other."""
    return "\n\n".join(f"# {name}.py\n{inspect.getsource(__import__(name))}" for name in MODULES)


def question_about(text: str, tokenizer: Any, n_tokens: int) -> Tensor:
    """Token ids int64 [1, n_tokens]: as much of ``text`` as fits, and a question about it, in the chat template."""
    document = tokenizer(text, add_special_tokens=False).input_ids

    def prompt(n: int) -> Tensor:
        content = f"{tokenizer.decode(document[:n])}\n\n{QUESTION}"
        chat = [{"role": "user", "content": content}]
        ids: Tensor = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).input_ids
        return ids

    frame = prompt(0).shape[1]
    if n_tokens <= frame:
        raise ValueError(f"tokens: expected more than {frame}, what the question alone takes, got {n_tokens}")
    return prompt(n_tokens - frame)

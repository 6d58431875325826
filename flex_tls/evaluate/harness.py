"""``python -m flex_tls.evaluate.harness``: lm-evaluation-harness, with models whose decoding is sparse.

It is the harness's own command with one more model, ``flex_tls``: as ``hf``, whose arguments it takes, but it generates
by :func:`flex_tls.generate`, and scores an answer by reading what goes before it as a prompt and the answer by decode
steps.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, cast

import torch
from torch import Tensor

from ..attention import Backend
from ..cache import TLSCache
from ..config import TLSConfig
from ..decode import generate
from ..integrations.huggingface import enabled, end_of_sequence_ids
from ..prefill import read_prompt
from ..sampling import Sampling

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]
except ImportError as error:
    raise ImportError(
        "flex_tls.evaluate.harness: expected lm-evaluation-harness, which is not installed; "
        "pip install 'flex_tls[harness]'"
    ) from error

SETTINGS = {field.name for field in fields(TLSConfig)}
SAMPLING = {field.name for field in fields(Sampling)}

# (context, answer) as texts, and the token ids of each
Request = tuple[Any, list[int], list[int]]


@register_model("flex_tls")
class TLSLM(HFLM):  # type: ignore[misc,unused-ignore]
    """A causal model of transformers that decodes through a :class:`flex_tls.TLSCache` of ``max_length`` tokens.

    Args:
        pretrained: as of ``hf``: folder, hub id, or a model.
        tls_backend: of :func:`flex_tls.two_level_attention`.
        compiled: of :func:`flex_tls.generate`.
        options: fields of :class:`flex_tls.TLSConfig`; all others are those of ``hf``.
    """

    def __init__(
        self, pretrained: Any, *, tls_backend: Backend = "auto", compiled: bool | None = None, **options: Any
    ) -> None:
        self._cfg = TLSConfig(**{name: options.pop(name) for name in SETTINGS & set(options)})
        self._tls_backend, self._compiled = tls_backend, compiled
        self._cache: TLSCache | None = None
        super().__init__(pretrained, **options)

    def _empty_cache(self, batch_size: int) -> TLSCache:
        """The same one as before if it has as many rows: its compiled step stays."""
        if self._cache is None or self._cache.batch_size != batch_size:
            if self._cache is not None:
                self._cache.close()
            self._cache = TLSCache(
                self.model.config, self._cfg, batch_size=batch_size, max_len=self.max_length,
                dtype=self.model.dtype, device=self.device, backend=self._tls_backend,
            )  # fmt: skip
        self._cache.reset()
        return self._cache

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], attention_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Called by ``generate_until`` for contexts int64 [B, S], left padded; returns them and what follows."""
        draws = options.pop("do_sample", None)
        unknown = sorted(set(options) - SAMPLING)
        if unknown:
            raise ValueError(f"gen_kwargs: expected some of {', '.join(sorted(SAMPLING))}, got {', '.join(unknown)}")
        if draws is False:
            options["temperature"] = 0.0
        elif draws:
            options.setdefault("temperature", 1.0)
        end = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        return generate(
            self.model, context, cache=self._empty_cache(context.shape[0]), attention_mask=attention_mask,
            max_new_tokens=max_length - context.shape[1], sampling=Sampling(**options),
            stop_token_ids=sorted({*end_of_sequence_ids(self.model), self.eot_token_id}),
            stop_strings=[string for string in stop if string not in ("", end)], tokenizer=self.tokenizer,
            pad_token_id=self.tokenizer.pad_token_id, compiled=self._compiled,
        )  # fmt: skip

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log-probability of the answer, whether it is the greedy one), one request after the other, in order.

        Answers to one context that follow one another read it once.
        """
        cache, found, read = self._empty_cache(1), [], None
        with enabled(self.model):
            for texts, context, answer in tqdm(requests, disable=disable_tqdm or self.rank != 0):
                if not 0 < len(answer) <= self.max_length:
                    raise ValueError(
                        f"answer: expected 1 to max_length={self.max_length} tokens, got {len(answer)}; raise it"
                    )
                ids = (context + answer)[-(self.max_length + 1) :]
                prompt, steps = ids[: -len(answer) - 1], ids[-len(answer) - 1 : -1]
                if prompt and prompt == read:
                    cache.crop(len(prompt))
                else:
                    cache.reset()
                    if prompt:
                        read_prompt(self.model, cache, self._row(prompt))
                read = prompt
                most = self._cfg.sparse_query_tokens
                chunks = [self._row(steps[i : i + most]) for i in range(0, len(steps), most)]
                log_p = torch.cat([self._step(cache, chunk) for chunk in chunks], dim=1)
                target = self._row(answer)
                is_greedy = bool((log_p.argmax(-1) == target).all())
                found.append((float(log_p.gather(2, target[..., None]).sum()), is_greedy))
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, found[-1])
        return found

    def _step(self, cache: TLSCache, ids: Tensor) -> Tensor:
        """Log-probabilities [1, T, V] of what follows each of ids [1, T]."""
        return cast(Tensor, self.model(ids, past_key_values=cache).logits).float().log_softmax(-1)

    def _row(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids], dtype=torch.int64, device=self.device)


if __name__ == "__main__":
    cli_evaluate()

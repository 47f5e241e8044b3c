"""Sampling from a model, one token at a time.

The prompt runs through the model once and fills a key/value cache; each further token costs one position. When the context is
full the cache is rebuilt from the last half of the text, which costs one long pass per half context instead of one per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from model.attention import KeyValueCache
from model.errors import DataError
from model.transformer import Transformer

__all__ = ["generate"]


def generate(
    model: Transformer,
    prompt_tokens: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> Iterator[int]:
    """Continue a prompt.

    Args:
        model: on any device; its parameters are only read.
        prompt_tokens: at least one token; a longer prompt than the context keeps its end.
        max_tokens: number of tokens to yield; the caller stops earlier if it likes, at an end-of-text token for instance.
        temperature: 0 picks the likeliest token always.
        top_p: sample among the likeliest tokens that together hold this probability.
        seed: of the private random generator.

    Yields:
        Token ids.

    Raises:
        DataError: an empty prompt, a token outside the vocabulary, or a setting out of range.
    """
    _check(model, prompt_tokens, temperature, top_p)
    return _continue(model, list(prompt_tokens), max_tokens, (temperature, top_p), torch.Generator().manual_seed(seed))


def _check(model: Transformer, prompt_tokens: Sequence[int], temperature: float, top_p: float) -> None:
    if not prompt_tokens:
        raise DataError("the prompt is empty; give at least one token")
    if min(prompt_tokens) < 0 or max(prompt_tokens) >= model.config.vocab_size:
        raise DataError("the prompt has tokens outside the model's vocabulary; use the run's own tokenizer")
    if temperature < 0 or not 0 < top_p <= 1:
        raise DataError("temperature must be at least 0, and top_p above 0 and at most 1")


def _continue(
    model: Transformer, text: list[int], max_tokens: int, sampling: tuple[float, float], source: torch.Generator
) -> Iterator[int]:
    context = model.config.max_sequence_tokens
    pending, cache = text[-context:], None
    for _ in range(max_tokens):
        if cache is None or cache.num_tokens + len(pending) > context:
            pending = text[-context:] if cache is None else text[-max(1, context // 2) :]
            device = model.head_weight.device
            cache = KeyValueCache(model.config, num_sequences=1, max_tokens=context, device=device)
        token = _sample(_next_logits(model, pending, cache), sampling, source)
        text.append(token)
        pending = [token]
        yield token


@torch.no_grad()
def _next_logits(model: Transformer, pending: list[int], cache: KeyValueCache) -> Tensor:
    weight = model.head_weight
    hidden = model.model(torch.tensor([pending], device=weight.device), cache)
    return torch.mv(weight, hidden[0, -1]).float().cpu()


def _sample(logits: Tensor, sampling: tuple[float, float], source: torch.Generator) -> int:
    temperature, top_p = sampling
    if temperature == 0:
        return int(logits.argmax())
    probabilities, order = torch.softmax(logits / temperature, dim=-1).sort(descending=True, stable=True)
    outside = probabilities.cumsum(0) - probabilities >= top_p  # the likeliest token always stays inside
    probabilities = probabilities.masked_fill(outside, 0.0)
    return int(order[torch.multinomial(probabilities, 1, generator=source)])

"""Greedy answers to several questions about each picture, whose rows pass the decoder once for all of them.

The answers are those of `skipvision.training.evaluate.answer_all`, in a fraction of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.rivals import SeenCache, extend, hide_skipped, prefill_whole
from skipvision.config import Visibility
from skipvision.data.questions import Question, is_right
from skipvision.decoder import KVCache
from skipvision.layout import BatchLayout, TokenLayout
from skipvision.model import SkipVisionModel
from skipvision.tokenizer import ASSISTANT, END, IMAGE, USER, special_ids
from skipvision.training.evaluate import MAX_NEW_TOKENS, Outcome
from skipvision.training.feature_cache import FeatureCache

_CROWDED = 0.75

Prefill = Callable[[SkipVisionModel, Tensor, Tensor, BatchLayout, int], tuple[Tensor, KVCache]]
"""Of model, ids, visual rows, layout and capacity: logits [B, vocab] of the last rows, and the cache."""


def visibility_of(model: SkipVisionModel) -> Visibility:
    """Who looks at skipped rows; a rival says it itself."""
    named: Visibility | None = getattr(model, "visibility", None)
    return named or ("image" if model.config.skip is None else model.config.skip.visibility)


@torch.no_grad()
def answers_by_picture(
    model: SkipVisionModel,
    tokenizer: Tokenizer,
    cache: FeatureCache,
    pictures: Sequence[int],
    *,
    evicts: bool = True,
    batch_size: int = 24,
    generator: torch.Generator | None = None,
) -> list[Outcome]:
    """Answers to the questions of the first draw of each of `pictures`, in order.

    Skipped rows leave the cache before the answer, or stay there without `evicts`, seen by whom the layout lets see
    them. `batch_size` counts pictures.
    """
    special, span, visibility = special_ids(tokenizer), model.span, visibility_of(model)
    outcomes: list[Outcome] = []
    for start in range(0, len(pictures), batch_size):
        chunk = list(pictures[start : start + batch_size])
        asked = [(picture, question) for picture in chunk for question in cache.questions[picture][0]]
        texts = [[special[USER], *tokenizer.encode(each.question).ids, special[ASSISTANT]] for _, each in asked]
        width = max(map(len, texts))
        data = cache.gather(chunk)
        visual = model.visual_rows(
            data["features"].to(model.decoder.embed.weight.dtype), data["cls_attention"], generator
        )
        layout = BatchLayout.of([TokenLayout((span,), visibility)] * len(chunk), 1)
        # Where all later rows look at skipped rows, the question must see them, whatever becomes of them then.
        prefill: Prefill = SkipVisionModel.prefill if evicts and visibility == "image" else prefill_whole
        ids = torch.full((len(chunk), 1), special[IMAGE])
        _, kept = prefill(model, ids, visual, layout, span.num_kept + width + MAX_NEW_TOKENS)
        if isinstance(kept, SeenCache) and visibility == "image":
            hide_skipped(kept, span.num_skipped)
        rows = torch.tensor([row for row, picture in enumerate(chunk) for _ in cache.questions[picture][0]])
        kept = picked(kept, rows)
        padded = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in texts])
        lengths = torch.tensor([len(ids) for ids in texts])
        logits = decode(model, padded, kept)[torch.arange(len(texts)), lengths - 1]
        kept.lengths -= width - lengths
        kept.next_positions -= width - lengths
        if isinstance(kept, SeenCache) and evicts:
            hide_skipped(kept, span.num_skipped)
        outcomes += judged(asked, continued(model, logits, kept, special[END]), tokenizer)
    return outcomes


@torch.no_grad()
def answers_by_question(
    model: SkipVisionModel,
    tokenizer: Tokenizer,
    cache: FeatureCache,
    pictures: Sequence[int],
    prefill: Prefill,
    *,
    batch_size: int = 64,
) -> list[Outcome]:
    """The same for what must see the whole prompt at once; `batch_size` counts questions."""
    special = special_ids(tokenizer)
    everything = [(picture, question) for picture in pictures for question in cache.questions[picture][0]]
    outcomes: list[Outcome] = []
    for start in range(0, len(everything), batch_size):
        asked = everything[start : start + batch_size]
        ids = [
            [special[IMAGE], special[USER], *tokenizer.encode(each.question).ids, special[ASSISTANT]]
            for _, each in asked
        ]
        data, width = cache.gather([picture for picture, _ in asked]), max(map(len, ids))
        visual = model.visual_rows(data["features"].to(model.decoder.embed.weight.dtype), data["cls_attention"])
        layouts = [TokenLayout.of(row, special[IMAGE], model.config, [model.span]) for row in ids]
        batch = BatchLayout.of(layouts, width)
        padded = torch.tensor([[*row, *[0] * (width - len(row))] for row in ids])
        logits, kept = prefill(model, padded, visual, batch, batch.num_kept + MAX_NEW_TOKENS)
        outcomes += judged(asked, continued(model, logits, kept, special[END]), tokenizer)
    return outcomes


def judged(
    asked: Sequence[tuple[int, Question]], answers: Sequence[Sequence[int]], tokenizer: Tokenizer
) -> list[Outcome]:
    """`asked` are pictures and questions; `answers` token ids."""
    texts = [tokenizer.decode(list(answer)) for answer in answers]
    return [
        Outcome(picture, question, text, is_right(question, text))
        for (picture, question), text in zip(asked, texts, strict=True)
    ]


@torch.no_grad()
def decode(model: SkipVisionModel, ids: Tensor, cache: KVCache) -> Tensor:
    """`SkipVisionModel.decode`, behind a cache that may say what is looked at."""
    if not isinstance(cache, SeenCache):
        return model.decode(ids, cache)
    return model.decoder.logits(extend(model.decoder, model.decoder.embed(ids), cache))


def picked(cache: KVCache, rows: Tensor) -> KVCache:
    """Of some of its sequences, or of one several times."""
    changed = {name: [each[rows] for each in getattr(cache, name)] for name in ("keys", "values")}
    if isinstance(cache, SeenCache):
        changed["seen"] = [each[rows] for each in cache.seen]
    return replace(cache, **changed, lengths=cache.lengths[rows], next_positions=cache.next_positions[rows])


def continued(model: SkipVisionModel, logits: Tensor, cache: KVCache, stop_id: int) -> list[list[int]]:
    """Greedy continuations, as `SkipVisionModel.generate` gives them; sequences that have ended leave the batch."""
    answers: list[list[int]] = [[] for _ in range(len(logits))]
    rows = torch.arange(len(answers))
    running = torch.ones(len(answers), dtype=torch.bool)
    for step in range(MAX_NEW_TOKENS):
        token = logits.argmax(-1)
        running &= token != stop_id
        for row, value in zip(rows[running].tolist(), token[running].tolist(), strict=True):
            answers[row].append(value)
        if not running.any() or step == MAX_NEW_TOKENS - 1:
            break
        if running.float().mean() < _CROWDED:  # copying the cache for each that ends costs more than it saves
            cache = picked(cache, running.nonzero()[:, 0])
            rows, token, running = rows[running], token[running], running[running]
        logits = decode(model, token[:, None], cache)[:, -1]
    return answers

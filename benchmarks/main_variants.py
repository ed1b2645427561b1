"""The rows of the main table: what each variant is, which rows it has, and what its prefill takes in FLOPs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from benchmarks.answering import Prefill
from benchmarks.rivals import (
    Reduce,
    Rival,
    average_pool,
    prefill_fastv,
    prefill_whole,
    random_drop,
    visionzip,
    without_summary,
)
from skipvision.config import ModelConfig, Selector, SkipConfig, TextConfig, Visibility
from skipvision.cost import decoder_flops, head_flops, layer_flops, ranking_flops, split_flops
from skipvision.layout import ImageSpan, TokenLayout
from skipvision.model import SkipVisionModel

TEXT_ROWS = 24
"""Of a prompt beside its picture, in what is counted and timed."""
MIDDLE = (44, 69)
"""The paper's 100 and 156 of 576, of 256."""
KEPT = MIDDLE[0] + 2
"""KV rows of the middle setting, summaries included: what rivals may keep."""
POOLED_SIDE = 7
DOMINANT, CONTEXTUAL = 39, 7
"""As many in all; 5.4 to 1, as VisionZip has them."""
FASTV_AFTER = 2

Group = Literal["dense", "skip", "ablation", "rival", "blind"]


@dataclass(frozen=True)
class Variant:
    """One way to spend visual rows."""

    title: str
    group: Group
    make: Callable[[SkipVisionModel], SkipVisionModel]
    """From the dense base, whose weights are copied."""
    weights_of: str = ""
    """The variant that was trained, where this one only uses its weights in another way."""
    extra_flops: Callable[[ModelConfig], int] = lambda _config: 0
    """What it does to one picture's tokens, and what ranks them."""
    evicts: bool = True
    received: bool = False
    """Ranked by what each patch receives, which encoded pictures do not have beside them."""
    ranked: bool = False
    """Ranked by CLS, though its config does not say so."""
    fastv: bool = False
    blind: bool = False

    def rows(self, model: SkipVisionModel) -> tuple[float, float]:
        """Visual rows in prefill and then in the cache, as means over layers."""
        span, depth = model.span, model.config.text.num_layers
        if self.blind:
            return 0, 0
        if self.fastv:
            mean = (FASTV_AFTER * span.length + (depth - FASTV_AFTER) * KEPT) / depth
            return mean, mean
        return span.length, span.num_kept if self.evicts else span.length

    def flops(self, model: SkipVisionModel) -> int:
        """Of the prefill of one picture and the text rows behind it: decoder, logits of the last row, and `extra`."""
        text, span = model.config.text, model.span
        if self.fastv:
            return fastv_flops(text, span.length, TEXT_ROWS)
        layout = TokenLayout((TEXT_ROWS,) if self.blind else (span, TEXT_ROWS))
        return decoder_flops(text, layout) + head_flops(text) + self.extra_flops(model.config)

    def prefill(self) -> Prefill:
        """How a whole prompt is read."""
        if self.fastv:
            return partial(prefill_fastv, num_left=KEPT, after=FASTV_AFTER)
        return SkipVisionModel.prefill if self.evicts else prefill_whole


def fastv_flops(text: TextConfig, picture: int, text_rows: int) -> int:
    """Of `prefill_fastv`, its ranking included: the last row's projections once more, and its scores."""
    query, key = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    rows, left = picture + text_rows, KEPT + text_rows
    ranking = 2 * text.hidden_size * (query + 2 * key) + 2 * query * rows
    deep = text.num_layers - FASTV_AFTER
    return (
        FASTV_AFTER * layer_flops(text, rows, rows) + ranking + deep * layer_flops(text, left, left) + head_flops(text)
    )


def zip_flops(config: ModelConfig) -> int:
    """Ranking by CLS, similarities to the contextual tokens, and their means."""
    others = config.num_tokens - DOMINANT
    return ranking_flops(config.vision, "cls_attention") + 4 * config.text.hidden_size * CONTEXTUAL * others


def bare_flops(config: ModelConfig) -> int:
    """Skip-Vision's own work in the middle setting, without the summaries."""
    whole = split_flops(replace(config, skip=SkipConfig(*MIDDLE)))
    return whole - 4 * config.text.hidden_size * sum(MIDDLE)


def cls_flops(config: ModelConfig) -> int:
    """Ranking by CLS."""
    return ranking_flops(config.vision, "cls_attention")


def dense(base: SkipVisionModel) -> SkipVisionModel:
    """The base itself."""
    return copy.deepcopy(base)


def _skipping(
    num_retained: int, num_skipped: int, selector: Selector = "cls_attention", visibility: Visibility = "image"
) -> Callable[[SkipVisionModel], SkipVisionModel]:
    return lambda base: copy.deepcopy(base.with_skip(SkipConfig(num_retained, num_skipped, selector, visibility)))


def _rival(
    span: ImageSpan, reduce: Reduce, visibility: Visibility = "image"
) -> Callable[[SkipVisionModel], SkipVisionModel]:
    def make(base: SkipVisionModel) -> SkipVisionModel:
        model = Rival(base.config, span, reduce, visibility)
        model.load_state_dict(base.state_dict())
        return model.train(base.training)

    return make


_MIDDLE = f"{MIDDLE[0]}/{MIDDLE[1]}"
_ZIP = _rival(ImageSpan(KEPT), visionzip(DOMINANT, CONTEXTUAL))

VARIANTS: dict[str, Variant] = {
    "dense": Variant("dense", "dense", dense),
    "skip-middle": Variant(f"Skip-Vision {_MIDDLE}", "skip", _skipping(*MIDDLE), extra_flops=split_flops),
    "skip-large": Variant("Skip-Vision 96/64", "skip", _skipping(96, 64), extra_flops=split_flops),
    "skip-small": Variant("Skip-Vision 24/40", "skip", _skipping(24, 40), extra_flops=split_flops),
    "pooled": Variant(
        f"average pooling to {POOLED_SIDE} x {POOLED_SIDE}",
        "rival",
        _rival(ImageSpan(POOLED_SIDE**2), average_pool(POOLED_SIDE)),
    ),
    "random-drop": Variant(
        f"random drop, {KEPT} left", "rival", _rival(ImageSpan(KEPT), random_drop(KEPT)), ranked=False
    ),
    "zip-trained": Variant(
        f"VisionZip-like {DOMINANT} + {CONTEXTUAL}, trained", "rival", _ZIP, extra_flops=zip_flops, ranked=True
    ),
    "zip": Variant(
        f"VisionZip-like {DOMINANT} + {CONTEXTUAL}, dense weights",
        "rival",
        _ZIP,
        weights_of="dense",
        extra_flops=zip_flops,
        ranked=True,
    ),
    "fastv": Variant(
        f"FastV-like, {KEPT} left, dense weights",
        "rival",
        dense,
        weights_of="dense",
        fastv=True,
    ),
    "seen-by-all": Variant(
        f"{_MIDDLE}, skipped rows seen by all",
        "ablation",
        _skipping(*MIDDLE, visibility="all"),
        extra_flops=split_flops,
    ),
    "seen-by-all-kept": Variant(
        f"{_MIDDLE}, seen by all, without Skip-KV",
        "ablation",
        _skipping(*MIDDLE, visibility="all"),
        weights_of="seen-by-all",
        extra_flops=split_flops,
        evicts=False,
    ),
    "middle-kept": Variant(
        f"{_MIDDLE}, without Skip-KV",
        "ablation",
        _skipping(*MIDDLE),
        weights_of="skip-middle",
        extra_flops=split_flops,
        evicts=False,
    ),
    "no-summary": Variant(
        f"{_MIDDLE}, without summaries (the {MIDDLE[0]} retained alone)",
        "ablation",
        # Nothing that is left would see skipped rows, so that they are not there.
        _rival(ImageSpan(MIDDLE[0]), without_summary(MIDDLE[0], 0)),
        extra_flops=cls_flops,
        ranked=True,
    ),
    "no-summary-seen": Variant(
        f"{_MIDDLE}, without summaries, seen by all",
        "ablation",
        _rival(ImageSpan(*MIDDLE), without_summary(*MIDDLE), "all"),
        extra_flops=bare_flops,
        ranked=True,
    ),
    "no-merge": Variant(
        f"{MIDDLE[0]}/{256 - MIDDLE[0]}, without merging",
        "ablation",
        _skipping(MIDDLE[0], 256 - MIDDLE[0]),
        extra_flops=split_flops,
    ),
    "random": Variant(
        f"{_MIDDLE}, retained at random", "ablation", _skipping(*MIDDLE, selector="random"), extra_flops=split_flops
    ),
    "received": Variant(
        f"{_MIDDLE}, retained by received attention",
        "ablation",
        _skipping(*MIDDLE, selector="received_attention"),
        extra_flops=split_flops,
        received=True,
    ),
    "blind": Variant("blind", "blind", dense, blind=True),
}
"""In the order in which they are run: what the table cannot do without comes first."""

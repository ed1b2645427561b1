"""What one picture with some text costs on a model, dense against skipped, from sizes alone. No torch, no weights.

FLOPs are those of cost.py: matrix products, a multiply-add as two.
"""

from __future__ import annotations

from dataclasses import dataclass

from skipvision.config import ModelConfig, Selector
from skipvision.cost import (
    decode_flops,
    decoder_flops,
    encoder_flops,
    head_flops,
    kv_bytes,
    merge_flops,
    projector_flops,
    ranking_flops,
)
from skipvision.families import text_parameters
from skipvision.layout import ImageSpan, TokenLayout
from skipvision.presets import Setting
from skipvision.roofline import Gpu

BYTES = 2
"""Of a weight and of an element of the KV cache, in fp16."""


@dataclass(frozen=True)
class Side:
    """The plain model, or the skipping one."""

    rows: int
    """Of the picture, in attention."""
    kv_rows: int
    """Of the picture, after prefill."""
    vision_flops: int | None
    """From pixels to visual rows; None where the setting does not fit the tower."""
    visual_flops: int
    """Prefill of the picture's rows alone, without logits: what the paper's shares are counted of."""
    prefill_flops: int
    """Of the whole prompt, and the logits of its last row."""
    decode_flops: int
    """The first token behind it."""
    picture_kv_bytes: int
    kv_bytes: int
    """Of the whole prompt."""

    def seconds(self, gpu: Gpu, weight_bytes: int) -> tuple[float, float]:
        """Prefill and one decoded token at best; `weight_bytes` of the decoder are read in either."""
        prefill = gpu.seconds(self.prefill_flops, weight_bytes + self.kv_bytes)
        return prefill, gpu.seconds(self.decode_flops, weight_bytes + self.kv_bytes)


@dataclass(frozen=True)
class Estimate:
    """Both, and what they read."""

    dense: Side
    skipped: Side
    decoder_bytes: int
    """Weights that prefill, and each decoded token, read: all but an embedding that is no head as well."""


def estimate(config: ModelConfig, setting: Setting, num_text: int) -> Estimate:
    """Of one picture and `num_text` rows of text. The skip setting of `config` itself does not count."""
    text = config.text
    embedding = 0 if text.tie_embeddings else text.vocab_size * text.hidden_size
    counts = setting.num_tokens, setting.num_retained, setting.num_skipped, setting.num_unpooled
    merging = setting.num_runs * merge_flops(text.hidden_size, *counts)
    if setting.is_ranked:
        ranked_by: Selector = "cls_attention" if config.vision.has_cls else "received_attention"
        merging += setting.num_views * ranking_flops(config.vision, ranked_by)
    return Estimate(
        _side(config, setting, setting.plain, num_text, 0),
        _side(config, setting, setting.skipped, num_text, merging),
        BYTES * (text_parameters(text) - embedding),
    )


def fits_tower(config: ModelConfig, setting: Setting) -> bool:
    """Whether the model's own tower and projector make as many tokens as the setting has."""
    return setting.is_own or setting.num_views * config.num_tokens == setting.num_tokens


def _side(config: ModelConfig, setting: Setting, span: ImageSpan, num_text: int, merging: int) -> Side:
    text, picture = config.text, TokenLayout((span,) * setting.num_runs)
    layout = TokenLayout((num_text, *picture.segments)) if num_text else picture
    seen = setting.num_views * (encoder_flops(config.vision) + projector_flops(config)) + merging
    return Side(
        rows=picture.length,
        kv_rows=picture.num_kept,
        vision_flops=seen if fits_tower(config, setting) else None,
        visual_flops=decoder_flops(text, picture),
        prefill_flops=decoder_flops(text, layout) + head_flops(text),
        decode_flops=decode_flops(text, layout.num_kept),
        picture_kv_bytes=kv_bytes(text, picture.num_kept, BYTES),
        kv_bytes=kv_bytes(text, layout.num_kept, BYTES),
    )

"""What one sequence costs, dense or skipped, from sizes and a layout alone. No torch.

A multiply-add counts as 2 FLOPs and only matrix products count; norms, softmax, RoPE and activations are left out, as
is usual. Attention counts every pair of rows, because that is what a masked kernel computes. With width d, query width
q, key width k, FFN width m, n attending rows and n_f rows in the FFN, one decoder layer takes

    (4 d q + 4 d k) n  +  4 n^2 q  +  6 d m n_f
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from skipvision.config import ModelConfig, ResamplerConfig, Selector, TextConfig, VisionConfig
from skipvision.layout import ImageSpan, TokenLayout


@dataclass(frozen=True)
class Cost:
    """What one prompt and the tokens behind it take."""

    vision_flops: int
    """All pictures: encoder, projector, merge and summaries."""
    prefill_flops: int
    """The whole prompt, and the logits of its last row."""
    decode_flops: int
    """The first token that is decoded behind the prompt; each later one takes slightly more."""
    kv_bytes: int
    """KV cache after prefill."""


def prompt_cost(config: ModelConfig, layout: TokenLayout, bytes_per_element: int = 2) -> Cost:
    """The cost of `layout` on the model of `config`; `bytes_per_element` is that of the KV cache."""
    text = config.text
    return Cost(
        vision_flops=sum(vision_flops(config, image) for image in layout.images),
        prefill_flops=decoder_flops(text, layout) + head_flops(text),
        decode_flops=decode_flops(text, layout.num_kept),
        kv_bytes=kv_bytes(text, layout.num_kept, bytes_per_element),
    )


def dense(config: ModelConfig, layout: TokenLayout) -> tuple[ModelConfig, TokenLayout]:
    """The same model and prompt without Skip-Vision: every patch is retained. `prompt_cost` takes both."""
    plain = replace(config, skip=None)
    segments = [
        each if isinstance(each, int) else ImageSpan.of(plain, each.num_tokens or None, each.num_views)
        for each in layout.segments
    ]
    return plain, TokenLayout(tuple(segments))


def layer_flops(text: TextConfig, rows: int, ffn_rows: int, cached_rows: int = 0) -> int:
    """One decoder layer: `rows` new rows attend to themselves and `cached_rows`; `ffn_rows` of them pass the FFN."""
    query, key = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    projections = 4 * text.hidden_size * (query + key) * rows
    attention = 4 * query * rows * (cached_rows + rows)
    return projections + attention + 6 * text.hidden_size * text.intermediate_size * ffn_rows


def decoder_flops(text: TextConfig, layout: TokenLayout) -> int:
    """All layers over the whole of `layout`: skipped rows attend, and bypass the FFN."""
    return text.num_layers * layer_flops(text, layout.length, layout.num_kept)


def head_flops(text: TextConfig) -> int:
    """The logits of one row."""
    return 2 * text.hidden_size * text.vocab_size


def decode_flops(text: TextConfig, cached_rows: int, new_rows: int = 1) -> int:
    """`new_rows` tokens behind `cached_rows`, with the logits of the last."""
    return text.num_layers * layer_flops(text, new_rows, new_rows, cached_rows) + head_flops(text)


def kv_bytes(text: TextConfig, rows: int, bytes_per_element: int = 2) -> int:
    """K and V of `rows` rows in all layers."""
    return 2 * text.num_layers * text.num_kv_heads * text.head_dim * rows * bytes_per_element


def vision_flops(config: ModelConfig, span: ImageSpan) -> int:
    """One run of visual rows, from the pixels of all its views."""
    seen = span.num_views * (encoder_flops(config.vision) + projector_flops(config))
    return seen + split_flops(config, span.num_tokens or None, span.num_views)


def encoder_flops(vision: VisionConfig) -> int:
    """The ViT up to the last layer that is read, CLS row included where there is one."""
    width, rows = vision.hidden_size, vision.num_rows
    patch_embedding = 2 * 3 * vision.patch_size**2 * width * vision.num_patches
    block = 8 * width**2 * rows + 4 * width * rows**2 + 4 * width * vision.intermediate_size * rows
    return patch_embedding + vision.num_layers_run * block


def projector_flops(config: ModelConfig) -> int:
    """The linear layers, and the convolutions as torch counts them: nine products everywhere, padding included; or a
    resampler."""
    if config.projector == "linear":
        return 2 * config.projector_input * config.text.hidden_size * config.num_tokens
    if config.resampler is not None:
        return resampler_flops(config, config.resampler)
    width = config.projector_size
    inputs = config.projector_input + config.text.hidden_size + 9 * width * config.projector_convs
    return 2 * inputs * width * config.num_tokens


def resampler_flops(config: ModelConfig, resampler: ResamplerConfig) -> int:
    """Each scale at each layer of the encoder that is read: K and V of every patch, and what its queries take; and the
    matrix behind them."""
    width, grid = config.vision.hidden_size, config.vision.grid
    patches = 4 * width**2 * config.vision.num_patches
    looks = 0
    for window, count in zip(resampler.windows, resampler.token_counts(grid), strict=True):
        query = 4 * width**2 * (1 + resampler.mlp_ratio) + 4 * width * window**2
        looks += patches + count * query
    return len(config.vision.feature_layers) * looks + 2 * width * config.text.hidden_size * config.num_tokens


def split_flops(config: ModelConfig, num_tokens: int | None = None, num_views: int = 1) -> int:
    """Ranking, merge and summaries: what Skip-Vision itself adds to one run of `num_tokens`, or else to one view."""
    skip, count = config.skip, config.num_tokens if num_tokens is None else num_tokens
    if skip is None:
        return 0
    num_skipped = min(skip.num_skipped, count - skip.num_retained)
    merging = merge_flops(config.text.hidden_size, count, skip.num_retained, num_skipped, skip.num_unpooled)
    return num_views * ranking_flops(config.vision, skip.selector) + merging


def ranking_flops(vision: VisionConfig, selector: Selector) -> int:
    """The attention that ranks one view's patches: one row of it, or all, since the encoder's kernel hands none out."""
    rows = {"cls_attention": 1, "received_attention": vision.num_rows}.get(selector, 0)
    return 2 * vision.hidden_size * rows * vision.num_rows


def merge_flops(width: int, num_tokens: int, num_retained: int, num_skipped: int, num_unpooled: int = 0) -> int:
    """Merging what is not retained of `num_tokens` tokens of `width` to `num_skipped`, and both summaries, the first of
    which leaves out `num_unpooled`."""
    rest = num_tokens - num_retained
    # A score and a weighted sum over either group.
    summaries = 4 * width * (num_retained - num_unpooled + num_skipped)
    if not 0 < num_skipped < rest:
        return summaries
    similarity = 2 * width * rest**2
    means = 2 * width * num_skipped * (rest - num_skipped)
    return similarity + means + summaries

"""Skipped rows last in memory with a mask, against the paper's two tensors joined before each attention.

    python -m benchmarks.row_order [--threads N]

Both run the same decoder layers with the same weights and give the same numbers; what differs is where rows lie.
`mask`: kept rows are a slice, attention takes a bool mask. `join`: rows are put in attention order before each
attention and split after it, so that a causal kernel needs no mask. Alternating, medians of prefill seconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measuring import ratio, spread, surroundings, write_results
from skipvision.config import ModelConfig, SkipConfig, TextConfig, VisionConfig
from skipvision.decoder import Decoder, DecoderLayer
from skipvision.layout import ImageSpan, TokenLayout
from skipvision.model import attention_mask

RESULTS = Path(__file__).parent / "results" / "row_order.json"
TEXT_ROWS = 24


def joined_prefill(decoder: Decoder, kept: Tensor, skipped: Tensor, place: int) -> Tensor:
    """The paper's layer: `skipped` [1, S, D] stands before row `place` of `kept` [1, K, D] in attention order."""
    num_skipped = skipped.shape[1]
    rope = decoder.rope(torch.arange(kept.shape[1] + num_skipped)[None])
    for layer in cast("Iterable[DecoderLayer]", decoder.layers):
        normed = torch.cat([layer.norm1(part) for part in (kept[:, :place], skipped, kept[:, place:])], 1)
        query, key, value = layer.attention.project(normed, rope)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        out = layer.attention.o(mixed.transpose(1, 2).flatten(2))
        before, middle, after = out.split([place, num_skipped, kept.shape[1] - place], 1)
        kept = kept + torch.cat([before, after], 1)
        skipped = skipped + middle
        kept = layer.feed_forward(kept, kept.shape[1])
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    cases = {
        "6 x 256, 96 + 64 rows": (TextConfig(), 96, 64),
        "4 x 1024, 256 + 320 rows": (
            TextConfig(hidden_size=1024, intermediate_size=3584, num_layers=4, num_heads=16, num_kv_heads=4), 256, 320
        ),
    }  # fmt: skip
    found: dict[str, Any] = {}
    for name, (text, num_retained, num_skipped) in cases.items():
        skip = SkipConfig(num_retained, num_skipped, visibility="all")
        config = ModelConfig(VisionConfig(image_size=448), text, skip)
        layout = TokenLayout((ImageSpan.of(config), TEXT_ROWS), "all")
        decoder = Decoder(text).eval()
        rows = torch.randn(1, layout.length, text.hidden_size)
        positions = torch.from_numpy(layout.positions)[None]
        mask = attention_mask(positions, torch.from_numpy(layout.visible_until)[None])
        num_kept = layout.num_kept
        mask_run = partial(decoder, rows, positions, mask, num_kept)
        join_run = partial(joined_prefill, decoder, rows[:, :num_kept], rows[:, num_kept:], num_retained + 1)
        runs: dict[str, Callable[[], Tensor]] = {"mask": mask_run, "join": join_run}
        seconds: dict[str, list[float]] = {key: [] for key in runs}
        with torch.no_grad():
            torch.testing.assert_close(runs["mask"](), runs["join"](), rtol=1e-3, atol=1e-4)
            for _ in range(options.rounds):
                for key, run in runs.items():
                    start = time.perf_counter()
                    run()
                    seconds[key].append(time.perf_counter() - start)
        found[name] = {key: spread(values) for key, values in seconds.items()}
        found[name]["mask_over_join"] = ratio(seconds["mask"], seconds["join"])
        print(name, found[name])
    write_results(surroundings(options.threads) | {"rounds": options.rounds, "cases": found}, RESULTS)


if __name__ == "__main__":
    main()

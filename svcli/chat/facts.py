"""What an answer took, as a line for people, as a table, and as values for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from svcli import ui

if TYPE_CHECKING:
    from svcli_engines.answer import Stats
    from svcli_engines.sampling import Sampling

ENDINGS = {
    "length": "the answer was cut off at --max-new-tokens",
    "context": "the answer was cut off: the context of this bundle is full",
}
"""What is worth a note about how an answer ended."""
INTERRUPTED = "interrupted"
"""How an answer ended that Ctrl-C stopped."""


def closing_line(stats: Stats) -> list[str]:
    """What the answer took, in parts."""
    return [
        f"{stats.visual_tokens_full}→{stats.visual_tokens_kept} visual tokens",
        f"KV {ui.size_change(stats.kv_bytes_full, stats.kv_bytes)}",
        # A second question about a picture does not look at it again.
        *([f"vision {ui.duration(stats.vision_seconds)}"] if stats.vision_seconds else []),
        f"prefill {ui.duration(stats.prefill_seconds)}",
        f"first token {ui.duration(stats.first_token_seconds)}",
        # An answer of one token has no rate.
        *([f"{stats.decode_tokens_per_second:.0f} tok/s"] if stats.decode_tokens_per_second else []),
        f"{stats.engine} {stats.precision}",
    ]


def spoken_line(stats: Stats) -> list[str]:
    """The same in words that can be read aloud."""
    return [
        f"{stats.visual_tokens_kept} of {stats.visual_tokens_full} visual tokens kept",
        f"cache {ui.size(stats.kv_bytes)} instead of {ui.size(stats.kv_bytes_full)}",
        f"first token after {ui.duration(stats.first_token_seconds)}",
        *([f"{stats.decode_tokens_per_second:.0f} tokens per second"] if stats.decode_tokens_per_second else []),
    ]


def table(stats: Stats, capacity: int) -> list[tuple[str, str]]:
    """All of it; `capacity` in rows of the KV cache."""
    rate = stats.decode_tokens_per_second
    return [
        ("engine", f"{stats.engine} {stats.precision}"),
        ("pictures", f"{stats.num_images}"),
        (
            "visual tokens",
            f"{stats.visual_tokens_full} full, {stats.visual_tokens_in} enter, {stats.visual_tokens_kept} are kept",
        ),
        ("KV rows", f"{stats.kv_rows} of {capacity}; {stats.kv_rows_full} without skipping"),
        ("KV bytes", f"{ui.size(stats.kv_bytes)}; {ui.size(stats.kv_bytes_full)} without skipping"),
        ("prompt rows", f"{stats.num_prompt_rows} computed, {stats.num_shared_rows} taken over from the turn before"),
        ("answer", f"{stats.num_tokens} tokens, ended by {stats.stop_reason}"),
        ("opening graphs", f"{ui.duration(stats.load_seconds)} so far"),
        ("vision", ui.duration(stats.vision_seconds)),
        ("prefill", ui.duration(stats.prefill_seconds)),
        ("first token", ui.duration(stats.first_token_seconds)),
        ("decode", f"{rate:.0f} tok/s" if rate else "one token, so no rate"),
    ]


def measured(stats: Stats) -> dict[str, Any]:
    """The same, all of it, for programs."""
    return {
        "engine": stats.engine,
        "precision": stats.precision,
        "tokens": {
            "answer": stats.num_tokens,
            "prompt_rows": stats.num_prompt_rows,
            "shared_rows": stats.num_shared_rows,
            "visual_full": stats.visual_tokens_full,
            "visual_in": stats.visual_tokens_in,
            "visual_kept": stats.visual_tokens_kept,
        },
        "kv_cache": {
            "rows_full": stats.kv_rows_full,
            "rows": stats.kv_rows,
            "bytes_full": stats.kv_bytes_full,
            "bytes": stats.kv_bytes,
        },
        "seconds": {
            "load": stats.load_seconds,
            "vision": stats.vision_seconds,
            "prefill": stats.prefill_seconds,
            "first_token": stats.first_token_seconds,
        },
        "tokens_per_second": stats.decode_tokens_per_second,
    }


def settings(sampling: Sampling) -> dict[str, Any]:
    """How the answer was drawn."""
    keys = ("temperature", "top_k", "top_p", "seed", "max_new_tokens")
    values = asdict(sampling)
    return {key: values[key] for key in keys}

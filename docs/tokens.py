"""Draws docs/tokens.svg: where the tokens of one image go in the bundled model, as `TokenLayout` counts them.

Run it from the root of the repository: python docs/tokens.py
"""

from __future__ import annotations

from pathlib import Path

from skipvision.config import ModelConfig
from skipvision.layout import ImageSpan, TokenLayout
from skipvision.training.recipes import read_scratch_recipe

RECIPE = Path(__file__).parents[1] / "recipes" / "skipvision-tiny.toml"

FULL, KEPT, SUMMARY, SKIPPED, INK, FAINT = "#8a94a6", "#2f6fde", "#e08a1e", "#c9d1dd", "#1d2433", "#5d6778"
HEIGHT = 32
SCALE = 2.4
"""Pixels per token."""
LEFT = 24
FONTS = "system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif"


class Drawing:
    """Rows of labelled bars, one below the other."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._y = 20.0

    def text(self, x: float, y: float, words: str, colour: str = INK, size: int = 14, weight: str = "normal") -> None:
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}" fill="{colour}">{words}</text>'
        )

    def row(self, title: str, why: str, bars: list[tuple[int, str, str]]) -> None:
        """One stage: what it is called, why it looks so, and its (tokens, colour, label) from left to right."""
        self.text(LEFT, self._y + 14, title, weight="bold")
        self.text(LEFT, self._y + 32, why, FAINT, 13)
        x, top = float(LEFT), self._y + 42
        for count, colour, label in bars:
            # A single summary token would be a hairline at true scale.
            width = max(count * SCALE, 5)
            self._parts.append(
                f'<rect x="{x:g}" y="{top:g}" width="{width:g}" height="{HEIGHT}" rx="2" fill="{colour}"/>'
            )
            if label:
                dark = colour == SKIPPED
                self.text(x + 8, top + 21, label, INK if dark else "#ffffff", 13)
            x += width + 2
        self._y = top + HEIGHT + 22

    def svg(self, width: int) -> str:
        height = self._y
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:g}" font-family="{FONTS}">',
                f'<rect width="{width}" height="{height:g}" rx="8" fill="#ffffff"/>',
                *self._parts,
                "</svg>\n",
            ]
        )


def draw(config: ModelConfig) -> str:
    """The figure for a model that skips."""
    span = ImageSpan.of(config)
    layout = TokenLayout((span,))
    patches, rest = config.vision.num_patches, config.vision.num_patches - span.num_retained
    kept = [(span.num_retained, KEPT, f"{span.num_retained} retained"), (1, SUMMARY, "")]
    drawing = Drawing()
    drawing.row(
        f"{patches} patches leave the vision encoder",
        "The CLS token's attention ranks them.",
        [(span.num_retained, KEPT, f"{span.num_retained} retained"), (rest, FULL, f"{rest} others")],
    )
    drawing.row(
        f"{layout.length} rows enter the decoder and pass attention",
        f"The others are merged to {span.num_skipped}; a summary token (orange) follows each group.",
        [*kept, (span.num_skipped, SKIPPED, f"{span.num_skipped} skipped"), (1, SUMMARY, "")],
    )
    drawing.row(
        f"{layout.num_kept} of them pass the feed-forward layers",
        "Skipped rows go around them, in every layer.",
        [*kept, (1, SUMMARY, "")],
    )
    drawing.row(
        f"{layout.num_kept} stay in the KV cache",
        f"Skipped rows are dropped after prefill: the plain model would keep {patches}.",
        [*kept, (1, SUMMARY, "")],
    )
    return drawing.svg(round(patches * SCALE) + 2 * LEFT + 2)


if __name__ == "__main__":
    target = Path(__file__).with_name("tokens.svg")
    target.write_text(draw(read_scratch_recipe(RECIPE).model), encoding="utf-8")
    print(f"wrote {target}")

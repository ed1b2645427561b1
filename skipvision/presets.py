"""How a picture's visual tokens are split: the paper's settings by name, with what it prints of them. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from skipvision.config import ConfigError, ModelConfig, Selector, SkipConfig, require
from skipvision.layout import ImageSpan


@dataclass(frozen=True)
class Printed:
    """Of the plain model's, as shares; None where the paper prints no figure."""

    flops: float | None = None
    hours: float | None = None
    """Of training."""
    latency: float | None = None


@dataclass(frozen=True)
class Setting:
    """How the visual tokens of one picture are split, as numbers."""

    title: str
    num_tokens: int
    """Visual tokens of the plain model."""
    num_retained: int
    num_skipped: int
    num_views: int = 1
    """Pictures that the encoder sees for one: tiles and thumbnail."""
    is_ranked: bool = True
    """Whether attention chooses what is retained, that of CLS where there is one; or else it is a fixed part."""
    num_unpooled: int = 0
    """Retained tokens that the first summary leaves out."""
    num_runs: int = 1
    """Runs of rows that one picture becomes, each split alike."""
    is_own: bool = False
    """Whether it was made for the model that it is asked of, so that its own tower sees those views."""
    printed: Printed = field(default_factory=Printed)

    def __post_init__(self) -> None:
        """Raises ConfigError for a split that cannot be."""
        rest = self.num_tokens - self.num_retained
        require(self.num_retained >= 1 and rest >= 0, f"of {self.num_tokens} visual tokens 1 to all can be retained")
        require(0 <= self.num_skipped <= rest, f"at most {rest} tokens can be skipped, since no more are not retained")

    def skip_config(self, config: ModelConfig) -> SkipConfig:
        """The setting for a model, as the paper trained it: all later rows see skipped ones, until they are evicted.

        Raises ConfigError for a model with other visual tokens.
        """
        joined, resampled = config.tiles is not None and config.tiles.is_joined, config.resampler is not None
        views = self.num_views if joined else 1
        if (self.num_views > 1) != joined or views * config.num_tokens != self.num_tokens:
            tokens = f"{config.num_tokens:,}{' and those of its tiles' if config.tiles is not None else ''}"
            raise ConfigError(f"{self.title} splits {self.num_tokens:,} visual tokens, and this model has {tokens}")
        require(resampled or joined or self.is_ranked, f"{self.title} needs a resampler, and this model has none")
        require(
            not (resampled and self.is_ranked), f"{self.title} ranks patches, and this model has a resampler's tokens"
        )
        if joined or resampled:
            return SkipConfig(self.num_retained, self.num_skipped, "first", "all", self.num_unpooled)
        ranked: Selector = "cls_attention" if config.vision.has_cls else "received_attention"
        return SkipConfig(self.num_retained, self.num_skipped, ranked, "all")

    @property
    def plain(self) -> ImageSpan:
        return ImageSpan(self.num_tokens)

    @property
    def skipped(self) -> ImageSpan:
        return ImageSpan(self.num_retained, self.num_skipped, num_summary=2 if self.num_skipped else 1)


PRESETS: Mapping[str, Setting] = {
    "sv-llava-100": Setting("SV-LLaVA", 576, 100, 156, printed=Printed(0.25, 7.9 / 10.2, 90 / 125)),
    "sv-llava-256": Setting("SV-LLaVA", 576, 256, 320, printed=Printed(0.60, 9.0 / 10.2, 103 / 125)),
    "sv-llava-hd": Setting(
        "SV-LLaVA-HD", 2880, 576, 576, num_views=5, is_ranked=False, printed=Printed(0.50, 12.2 / 19, 250 / 450)
    ),
    "sv-cos-272": Setting(
        "SV-CoS", 1296, 272, 256, is_ranked=False, num_unpooled=16, printed=Printed(0.25, 9.8 / 15.3, 90 / 160)
    ),
    "sv-vicuna-64": Setting("SV-LLaVA-1.5, on Vicuna", 576, 64, 156),
}
"""Skip-Vision, table 1, and the last one of table 4. FLOPs as printed in the first."""

"""A recipe of a model from nothing: TOML, read into frozen dataclasses; unknown keys are errors."""

from __future__ import annotations

from dataclasses import dataclass, field

from skipvision.config import ModelConfig, require, require_numbers

_SMALLEST_VOCABULARY = 261  # every byte, and the five special tokens


@dataclass(frozen=True)
class DataRecipe:
    """Which pictures are made and encoded once, before training."""

    num_scenes: int = 12000
    """Composed pictures, seeds 0 to num_scenes - 1 of the train split."""
    easy_vqa: int = 1000
    """Also this many of easy-VQA's 4,000 train pictures."""
    question_draws: int = 4
    """How many times questions are drawn for each picture; one pass over the data uses one draw."""
    questions_per_draw: int = 8

    def __post_init__(self) -> None:
        require_numbers(self, "data.", num_scenes=0, easy_vqa=0)


@dataclass(frozen=True)
class OptimRecipe:
    """How the projector, the summary layer and the decoder are trained. The vision encoder stays frozen."""

    steps: int = 2000
    batch_size: int = 32
    """Pictures a step."""
    text_width: int = 144
    """Text rows a picture: as many questions as fit."""
    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-5
    warmup_steps: int = 100
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    align_steps: int = 0
    """Steps before all others, of the patch loss alone, in which only the projector learns: quick, since no decoder
    runs."""
    align_batch_size: int = 32
    patch_loss: float = 0.5
    """Weight of the auxiliary loss: what, and which colour, each projected patch shows."""
    place_loss: float = 0.5
    """Weight of the auxiliary loss: where in the picture each name of a question or answer is."""
    second_turn: float = 0.25
    """Share of questions that follow another one in the same block, as in a conversation."""

    def __post_init__(self) -> None:
        schedule, losses = ("min_learning_rate", "warmup_steps", "align_steps"), ("patch_loss", "place_loss")
        free = dict.fromkeys((*schedule, *losses, "weight_decay", "second_turn"), 0)
        require_numbers(self, "optim.", **free)
        require(self.second_turn <= 1, f"optim.second_turn must be at most 1, got {self.second_turn}")


@dataclass(frozen=True)
class ScratchRecipe:
    """One model from nothing but the packages that `skipvision.data` fetches."""

    model: ModelConfig
    data: DataRecipe = field(default_factory=DataRecipe)
    optim: OptimRecipe = field(default_factory=OptimRecipe)
    seed: int = 0
    vocab_size: int = 1280
    """Upper bound; the model takes the number of tokens that the tokenizer found."""
    blind: bool = False
    """Train and answer without the picture: the baseline that shows what language alone can guess."""
    save_every: int = 100
    """Steps between resumable checkpoints."""
    assets: str = "build/assets"
    """Where `svcli data fetch` puts the packages, relative to the working directory."""

    def __post_init__(self) -> None:
        require_numbers(self, seed=0, vocab_size=_SMALLEST_VOCABULARY)
        skip = self.model.skip
        # Training reads features that are encoded once, with the attention of CLS beside them.
        trained = skip is None or skip.selector in ("cls_attention", "random", "uniform")
        require(trained, "model.skip.selector: training knows cls_attention, random and uniform")
        require(self.model.tiles is None, "model.tiles: training sees a picture once")
        # Its auxiliary losses ask each token what the patch behind it shows.
        by_patch = self.model.resampler is None and self.model.pixel_shuffle == 1
        require(
            by_patch, "model.projector: training needs one token for each patch, so no resampler and pixel_shuffle 1"
        )

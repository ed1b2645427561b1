"""A recipe that trains a model that there is, on conversations about pictures: TOML, read into frozen dataclasses.

Unknown keys are errors. Defaults are those of LLaVA-1.5's second stage (arXiv 2310.03744), which Skip-Vision keeps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from skipvision.config import SkipConfig, require, require_numbers

What = Literal["projector", "full", "lora"]
Precision = Literal["auto", "fp32", "bf16"]
Format = Literal["auto", "json", "datasets", "tar"]


@dataclass(frozen=True)
class SourceRecipe:
    """One set of conversations."""

    path: str
    """A JSON or JSONL file; a folder, Parquet or Arrow file, or hub id of a data set; a tar shard, or a pattern such as
    `shards/{000..031}.tar` or `shards/*.tar`. Relative to the working directory."""
    format: Format = "auto"
    """`auto` goes by the name."""
    images: str = ""
    """Folder that names of pictures are relative to; the file's own where it is empty."""
    split: str = "train"
    """Of a data set."""
    weight: float = 1.0
    """How often its samples are shown in one epoch: 2 shows each twice, 0.5 another half each time."""

    def __post_init__(self) -> None:
        require_numbers(self, "source ")
        require(bool(self.path), "source path must not be empty")


@dataclass(frozen=True)
class TuneData:
    """What is shown."""

    sources: tuple[SourceRecipe, ...]
    validation: tuple[SourceRecipe, ...] = ()
    """Weights do not count here."""
    validation_samples: int = 0
    """Or else so many samples of `sources`, which training then does not see."""
    max_length: int = 2048
    """Rows of one sequence, visual ones included, skipped ones too. A longer sample counts as broken."""
    max_broken: int = 0
    """Samples that may be broken before the run stops; each is named and left out."""
    group_by_length: bool = True
    """Batches of samples of about the same length, pictures and text alone apart."""
    pack: bool = False
    """As many samples in one sequence as fit `max_length`; none sees another."""
    num_workers: int = 0
    """Processes that look at samples, and then read and decode pictures; 0: that of the steps does so in between."""

    def __post_init__(self) -> None:
        require_numbers(self, "data.", validation_samples=0, max_broken=0, num_workers=0)
        require(bool(self.sources), "data.sources must name at least one source")
        require(
            not (self.validation and self.validation_samples), "data: either validation or validation_samples, not both"
        )


@dataclass(frozen=True)
class LoraRecipe:
    """Low-rank adapters (arXiv 2106.09685) on the decoder, through peft."""

    rank: int = 128
    alpha: int = 256
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    """Names of the decoder's linear layers."""

    def __post_init__(self) -> None:
        require_numbers(self, "lora.", dropout=0)
        require(self.dropout < 1, f"lora.dropout must be below 1, got {self.dropout}")
        known = {"q", "k", "v", "o", "gate", "up", "down"}
        unknown = sorted(set(self.targets) - known)
        require(not unknown, f"lora.targets: unknown {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        require(bool(self.targets), "lora.targets must name at least one layer")


@dataclass(frozen=True)
class TuneOptim:
    """How it is learned: AdamW, warm-up, a cosine down to `min_learning_rate`."""

    epochs: float = 1.0
    steps: int = 0
    """Steps in place of epochs, where it is not 0."""
    batch_size: int = 128
    """Sequences of one step, of all processes and all their micro-batches."""
    micro_batch_size: int = 8
    """Sequences that one process has in memory at a time; gradients are accumulated up to `batch_size`."""
    learning_rate: float = 2e-5
    min_learning_rate: float = 0.0
    projector_learning_rate: float = 0.0
    """Of the projector and the summary layer; 0: as all others."""
    vision_learning_rate: float = 0.0
    """Of the vision tower's last layer; 0: the tower is frozen."""
    vision_decay: float = 1.0
    """Each layer of the tower learns by this factor slower than the one behind it (Chain-of-Sight's run: 0.9)."""
    warmup_share: float = 0.03
    """Of all steps."""
    weight_decay: float = 0.0
    """Of matrices; biases, norms and embeddings of positions have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        free = ("steps", "min_learning_rate", "projector_learning_rate", "vision_learning_rate", "warmup_share")
        require_numbers(self, "optim.", **dict.fromkeys((*free, "weight_decay", "betas"), 0))
        require(self.warmup_share < 1, f"optim.warmup_share must be below 1, got {self.warmup_share}")
        require(max(self.betas) < 1, f"optim.betas must be below 1, got {self.betas}")
        require(
            0 < self.vision_decay <= 1, f"optim.vision_decay must be above 0 and at most 1, got {self.vision_decay}"
        )
        whole = self.batch_size % self.micro_batch_size == 0
        require(whole, f"optim.micro_batch_size must divide optim.batch_size {self.batch_size}")


@dataclass(frozen=True)
class SaveRecipe:
    """What is kept of a run."""

    every: int = 200
    """Steps between resumable states."""
    keep: int = 2
    """The last states that are kept, beside the best by validation."""
    validate_every: int = 0
    """Steps between validations; 0: with each state, where there is anything to validate on."""

    def __post_init__(self) -> None:
        require_numbers(self, "save.", validate_every=0)


@dataclass(frozen=True)
class LogRecipe:
    """Loggers beside the run's own log.jsonl; each needs its package."""

    tensorboard: bool = False
    """Event files in the run's folder."""
    wandb: str = ""
    """Project of Weights & Biases."""


@dataclass(frozen=True)
class TuneRecipe:
    """One run on one base."""

    base: str
    """Folder of a checkpoint or a published model, or the hub id of one."""
    data: TuneData
    what: What = "full"
    """What learns: the projector alone (stage 1), projector and decoder (stage 2), or projector and adapters of the
    decoder. The summary layer always learns where there is one."""
    preset: str = ""
    """How the model is to skip: one of the paper's settings by name, or `off`; as the base does where it is empty."""
    skip: SkipConfig | None = None
    """Or in full."""
    optim: TuneOptim = field(default_factory=TuneOptim)
    lora: LoraRecipe = field(default_factory=LoraRecipe)
    save: SaveRecipe = field(default_factory=SaveRecipe)
    log: LogRecipe = field(default_factory=LogRecipe)
    precision: Precision = "auto"
    """Of what is computed; weights and optimiser are fp32. `auto` is bf16 where the hardware multiplies it."""
    checkpoint_activations: bool = False
    """Compute a layer's activations again in the backward pass instead of keeping them."""
    deterministic: bool = False
    """Only deterministic kernels: the same run gives the same bits on the same machine."""
    seed: int = 0

    def __post_init__(self) -> None:
        require_numbers(self, seed=0)
        require(not (self.preset and self.skip), "either preset or skip, not both")
        require(bool(self.base), "base must name a model")

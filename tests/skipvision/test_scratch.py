"""A whole run in small: it learns, it can be killed and goes on exactly, and it keeps to its folder."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from skipvision.checkpoint import load_checkpoint
from skipvision.config import SkipConfig
from skipvision.data.names import COLOUR_IDS, LABEL_IDS, LABELS
from skipvision.data.questions import Question, vocabulary_text
from skipvision.model import SkipVisionModel
from skipvision.tokenizer import ASSISTANT, END, USER, special_ids, train_tokenizer
from skipvision.training import scratch
from skipvision.training.distributed import Processes
from skipvision.training.errors import TrainError
from skipvision.training.events import DoneEvent, Event, StageEvent, StepEvent, ValidationEvent
from skipvision.training.feature_cache import FeatureCache
from skipvision.training.heads import PatchHead, PlaceHead
from skipvision.training.scratch import (
    Batches,
    ScratchBatch,
    ScratchTask,
    initialise,
    scratch_settings,
    train,
)
from skipvision.training.scratch_recipe import ScratchRecipe
from skipvision.training.speaker import IGNORE
from skipvision.training.state import Progress, States
from skipvision.training.update import Clock, Updater

pytestmark = pytest.mark.usefixtures("no_downloads")


ALIGNING = "aligning the projector"


class Killed(Exception):
    """What ends a run from outside."""


def run(
    recipe: ScratchRecipe,
    output: Path,
    *,
    cache_root: Path,
    kill_at: int | None = None,
    kill_stage: str | None = None,
    fresh: bool = False,
) -> list[Event]:
    events: list[Event] = []

    def report(event: Event) -> None:
        events.append(event)
        if kill_at is not None and kill_at in done_of([event], kill_stage):
            raise Killed

    if kill_at is None:
        train(recipe, output, report, cache_root=cache_root, fresh=fresh)
    else:
        with pytest.raises(Killed):
            train(recipe, output, report, cache_root=cache_root, fresh=fresh)
    return events


def done_of(events: Sequence[Event], stage: str | None = None) -> list[float]:
    """How far each event of a stage has come, or of the steps where none is named."""
    if stage is None:
        return [event.step for event in events if isinstance(event, StepEvent)]
    return [event.done for event in events if isinstance(event, StageEvent) and event.what == stage]


def losses(output: Path) -> dict[int, tuple[float, float, float]]:
    """Answer loss, patch loss and place loss of each step, as last logged."""
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [row for row in rows if row.get("event") == "step"]
    return {row["step"]: (row["loss"], row["parts"]["patch_loss"], row["parts"]["place_loss"]) for row in steps}


@pytest.fixture(scope="module")
def cache_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared: pictures are encoded once."""
    return tmp_path_factory.mktemp("cache")


def test_several_processes_are_refused_before_anything_is_encoded(
    recipe: ScratchRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "joined", lambda _device: nullcontext(Processes(0, 2)))
    with pytest.raises(TrainError, match="start it without torchrun"):
        train(recipe, tmp_path / "run", lambda event: pytest.fail(str(event)), cache_root=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("kill_at", [1, 3, 4, 6])
def test_a_killed_run_goes_on_exactly_as_if_it_had_not_been(
    recipe: ScratchRecipe, tmp_path: Path, cache_root: Path, kill_at: int
) -> None:
    """Saves are made behind steps 2, 4 and 6."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(recipe, whole, cache_root=cache_root)
    run(recipe, killed, cache_root=cache_root, kill_at=kill_at)
    assert not (killed / "checkpoint").exists()
    events = run(recipe, killed, cache_root=cache_root)
    first = done_of(events)[0]
    assert first == (kill_at - 1) // 2 * 2 + 1
    assert losses(whole).keys() == set(range(1, 7))
    assert losses(killed) == losses(whole)
    one, other = (load_file(each / "checkpoint" / "model.safetensors") for each in (whole, killed))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_finished_run_ends_at_once_and_writes_its_checkpoint_again(
    recipe: ScratchRecipe, tmp_path: Path, cache_root: Path
) -> None:
    run(recipe, tmp_path, cache_root=cache_root)
    before = (tmp_path / "checkpoint" / "model.safetensors").read_bytes()
    events = run(recipe, tmp_path, cache_root=cache_root)
    assert not done_of(events)
    assert (tmp_path / "checkpoint" / "model.safetensors").read_bytes() == before


def test_the_checkpoint_is_whole_and_says_what_it_is(recipe: ScratchRecipe, tmp_path: Path, cache_root: Path) -> None:
    run(recipe, tmp_path, cache_root=cache_root)
    model = load_checkpoint(tmp_path / "checkpoint")
    tokenizer = Tokenizer.from_file(str(tmp_path / "checkpoint" / "tokenizer.json"))
    assert model.config.text.vocab_size == tokenizer.get_vocab_size() <= recipe.vocab_size
    assert replace(model.config.text, vocab_size=recipe.model.text.vocab_size) == recipe.model.text
    assert (model.config.vision, model.config.skip) == (recipe.model.vision, recipe.model.skip)


def test_the_encoder_stays_as_it_was_and_all_else_learns(
    recipe: ScratchRecipe, tmp_path: Path, cache_root: Path
) -> None:
    """Against a run of one step, whose update is as good as nothing: warm-up starts at a hundredth."""
    one, six = tmp_path / "one", tmp_path / "six"
    slow = replace(recipe.optim, steps=1, warmup_steps=100, learning_rate=1e-9)
    run(replace(recipe, optim=slow), one, cache_root=cache_root)
    run(recipe, six, cache_root=cache_root)
    start, end = (load_file(each / "checkpoint" / "model.safetensors") for each in (one, six))
    for name, tensor in start.items():
        if name.startswith("vision."):
            assert torch.equal(tensor, end[name]), name
        else:
            # Whatever has no part in the softmax of the summary has no gradient either.
            idle = name in ("summary.score.bias", "summary.norm.bias")
            assert idle or (tensor - end[name]).abs().max() > 1e-4, name


def test_the_loss_falls(recipe: ScratchRecipe, tmp_path: Path, cache_root: Path) -> None:
    longer = replace(recipe, optim=replace(recipe.optim, steps=40), save_every=40)
    run(longer, tmp_path, cache_root=cache_root)
    answer = [loss for loss, _, _ in losses(tmp_path).values()]
    assert sum(answer[-5:]) < 0.9 * sum(answer[:5])


def test_progress_reports_every_stage(recipe: ScratchRecipe, tmp_path: Path) -> None:
    events = run(recipe, tmp_path / "run", cache_root=tmp_path / "cache")
    encoding = [event for event in events if isinstance(event, StageEvent)]
    assert {event.what for event in encoding} == {"encoding pictures"}
    assert [event.done for event in encoding] == sorted(event.done for event in encoding)
    assert (encoding[-1].done, encoding[-1].total) == (10, 10)
    assert done_of(events) == [1, 2, 3, 4, 5, 6]
    (validation,) = (event for event in events if isinstance(event, ValidationEvent))
    assert "all" in validation.scores
    assert isinstance(events[-1], DoneEvent)


@pytest.mark.parametrize(
    "change",
    [
        lambda recipe: replace(recipe, seed=6),
        lambda recipe: replace(recipe, optim=replace(recipe.optim, steps=8)),
        lambda recipe: replace(recipe, model=replace(recipe.model, skip=None)),
    ],
    ids=["seed", "steps", "model"],
)
def test_another_recipe_is_refused_in_the_same_folder(
    recipe: ScratchRecipe, tmp_path: Path, cache_root: Path, change: Callable[[ScratchRecipe], ScratchRecipe]
) -> None:
    run(recipe, tmp_path, cache_root=cache_root)
    before = saved(tmp_path).read_bytes()
    with pytest.raises(TrainError, match=r"belongs to another recipe; use another folder, or .* --fresh$"):
        run(change(recipe), tmp_path, cache_root=cache_root)
    assert saved(tmp_path).read_bytes() == before


def test_fresh_starts_anew(recipe: ScratchRecipe, tmp_path: Path, cache_root: Path) -> None:
    run(recipe, tmp_path, cache_root=cache_root)
    first = losses(tmp_path)
    events = run(recipe, tmp_path, cache_root=cache_root, fresh=True)
    assert done_of(events) == [1, 2, 3, 4, 5, 6]
    assert losses(tmp_path) == first
    run(replace(recipe, seed=6), tmp_path, cache_root=cache_root, fresh=True)
    assert losses(tmp_path) != first


def test_a_damaged_save_is_refused_with_a_way_out(recipe: ScratchRecipe, tmp_path: Path, cache_root: Path) -> None:
    run(recipe, tmp_path, cache_root=cache_root)
    file = saved(tmp_path)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(TrainError, match=r"safetensors: missing, cut or altered; .* --fresh$"):
        run(recipe, tmp_path, cache_root=cache_root)


def saved(output: Path) -> Path:
    """The one state of a finished run."""
    (file,) = (output / "states").glob("*/*.safetensors")
    return file


def rows_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_log_has_every_step_once_however_often_a_run_is_killed(
    recipe: ScratchRecipe, tmp_path: Path, cache_root: Path
) -> None:
    for kill_at in (1, 3, 4):
        run(recipe, tmp_path, cache_root=cache_root, kill_at=kill_at)
    with (tmp_path / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"step": 5, "lo')
    run(recipe, tmp_path, cache_root=cache_root)
    rows = rows_of(tmp_path)
    assert list(rows[0]) == ["encode_seconds"]
    told = [(row["event"], row["step"]) for row in rows[1:]]
    assert told == [*(("step", step) for step in range(1, 7)), ("validation", 6), ("done", 6)]
    run(recipe, tmp_path, cache_root=cache_root, fresh=True)
    assert [row.get("step") for row in rows_of(tmp_path)] == [None, 1, 2, 3, 4, 5, 6, 6, 6]


def test_a_fresh_run_that_is_killed_early_does_not_go_on_from_the_run_before(
    recipe: ScratchRecipe, tmp_path: Path, cache_root: Path
) -> None:
    run(recipe, tmp_path, cache_root=cache_root)
    run(recipe, tmp_path, cache_root=cache_root, kill_at=1, fresh=True)
    events = run(recipe, tmp_path, cache_root=cache_root)
    assert done_of(events)[0] == 1


@pytest.mark.parametrize("skip", [None, SkipConfig(6, 0), SkipConfig(6, 4, visibility="all")], ids=str)
def test_other_settings_train_and_resume_as_well(
    recipe: ScratchRecipe, tmp_path: Path, cache_root: Path, skip: SkipConfig | None
) -> None:
    other = replace(recipe, model=replace(recipe.model, skip=skip))
    run(other, tmp_path, cache_root=cache_root, kill_at=3)
    run(other, tmp_path, cache_root=cache_root)
    assert load_checkpoint(tmp_path / "checkpoint").config.skip == skip


def test_a_blind_run_never_looks(
    recipe: ScratchRecipe, features: FeatureCache, tmp_path: Path, cache_root: Path
) -> None:
    """Other features, same answer losses; the patches are still looked at for their own loss."""
    blind = replace(recipe, blind=True)
    run(blind, tmp_path / "blind", cache_root=cache_root)
    assert losses(tmp_path / "blind").keys() == set(range(1, 7))
    by_features = []
    for factor in (1.0, -3.0):
        blind_run = made_run(blind, features)
        batch = blind_run.task.batch(0)
        batch.data["features"] *= factor
        answer, patches, _ = blind_run.step_once(batch)
        by_features.append((answer, patches))
    assert by_features[0][0] == by_features[1][0]
    assert by_features[0][1] != by_features[1][1]


def test_a_killed_run_with_random_selection_goes_on_exactly(
    recipe: ScratchRecipe, tmp_path: Path, cache_root: Path
) -> None:
    random = replace(recipe, model=replace(recipe.model, skip=SkipConfig(6, 4, selector="random")))
    run(random, tmp_path / "whole", cache_root=cache_root)
    run(random, tmp_path / "killed", cache_root=cache_root, kill_at=3)
    run(random, tmp_path / "killed", cache_root=cache_root)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    killed, whole = (
        [row for row in rows_of(tmp_path / name) if row.get("event") == "validation"] for name in ("killed", "whole")
    )
    assert killed == whole


def test_random_selection_draws_anew_at_every_step(recipe: ScratchRecipe, features: FeatureCache) -> None:
    random = replace(recipe, model=replace(recipe.model, skip=SkipConfig(6, 4, selector="random")))
    random = replace(random, optim=replace(random.optim, warmup_steps=1, learning_rate=1e-12, weight_decay=0.0))
    the_run = made_run(random, features)
    batch = the_run.task.batch(0)
    answers = [the_run.step_once(replace(batch, step=step))[0] for step in (0, 1, 0)]
    assert answers[0] != pytest.approx(answers[1], abs=1e-5)
    assert answers[0] == pytest.approx(answers[2], abs=1e-6)


def test_a_killed_run_goes_on_exactly_where_some_batches_know_no_patches(
    recipe: ScratchRecipe, features: FeatureCache, tmp_path: Path
) -> None:
    """As with easy-VQA, whose pictures come without truths: their batches leave the patch head alone."""
    slow = replace(recipe, optim=replace(recipe.optim, steps=4, warmup_steps=0), save_every=2)

    def step(number: int, the_run: MadeRun) -> tuple[float, float, float]:
        batch = the_run.task.batch(number)
        if number == 0:
            batch.data["labels"] = torch.full_like(batch.data["labels"], -1)
        return the_run.step_once(batch)

    whole, resumed = made_run(slow, features), made_run(slow, features)
    step(0, whole)
    step(1, whole)
    states = States(tmp_path, {"recipe": "this"}, 0, 1, Processes())
    states.save(Progress(2), whole.task.module, whole.updater.optimiser)
    states.load(2, resumed.task.module, resumed.updater.optimiser)
    for the_run in (whole, resumed):
        step(2, the_run)
    assert step(3, resumed) == step(3, whole)


def test_a_batch_larger_than_the_data_is_refused(recipe: ScratchRecipe, tmp_path: Path, cache_root: Path) -> None:
    large = replace(recipe, optim=replace(recipe.optim, batch_size=9))
    with pytest.raises(TrainError, match="batch_size"):
        run(large, tmp_path, cache_root=cache_root)


def test_a_text_width_that_no_question_fits_is_refused(recipe: ScratchRecipe, tmp_path: Path, cache_root: Path) -> None:
    narrow = replace(recipe, optim=replace(recipe.optim, text_width=4))
    with pytest.raises(TrainError, match="text_width"):
        run(narrow, tmp_path, cache_root=cache_root)


# --- parts ---------------------------------------------------------------------------------------------------------


def tokenizer_of(features: FeatureCache) -> Tokenizer:
    return train_tokenizer([q.question + q.answer for draws in features.questions for draw in draws for q in draw], 400)


class MadeRun:
    """A run that has not begun, without a folder."""

    def __init__(self, recipe: ScratchRecipe, features: FeatureCache) -> None:
        torch.manual_seed(0)
        tokenizer = train_tokenizer(["What is this? This is a red circle."], 400)
        text = replace(recipe.model.text, vocab_size=tokenizer.get_vocab_size())
        self.model = SkipVisionModel(replace(recipe.model, text=text))
        initialise(self.model)
        self.task = ScratchTask(recipe, self.model, tokenizer, Batches(recipe, features, tokenizer))
        self.updater = Updater(self.task, scratch_settings(recipe), Processes())

    def step_once(self, batch: ScratchBatch) -> tuple[float, float, float]:
        """One update; answer loss, patch loss and place loss."""
        clock = Clock(torch.device("cpu"))
        gathered = self.updater.gather(batch.step, [batch], clock)
        self.updater.apply(batch.step, gathered, [batch], clock)
        return gathered.loss, gathered.parts["patch_loss"], gathered.parts["place_loss"]


def made_run(recipe: ScratchRecipe, features: FeatureCache) -> MadeRun:
    return MadeRun(recipe, features)


def test_a_batch_depends_on_seed_and_step_alone(recipe: ScratchRecipe, features: FeatureCache) -> None:
    tokenizer = tokenizer_of(features)
    one, other = (Batches(recipe, features, tokenizer) for _ in range(2))
    for step in range(3):
        one(step)
    for step in (2, 5, 0):
        (data, text), (same_data, same_text) = one(step), other(step)
        assert torch.equal(text.input_ids, same_text.input_ids)
        assert torch.equal(text.labels, same_text.labels)
        assert torch.equal(data["features"], same_data["features"])
    elsewhere = Batches(replace(recipe, seed=6), features, tokenizer)
    assert not torch.equal(elsewhere(0)[1].input_ids, one(0)[1].input_ids)


def test_every_picture_comes_once_an_epoch(recipe: ScratchRecipe, features: FeatureCache) -> None:
    batches = Batches(recipe, features, tokenizer_of(features))
    attention = features.gather(range(len(features)))["cls_attention"]
    for epoch in range(2):
        seen = torch.cat([batches(epoch * 4 + step)[0]["cls_attention"] for step in range(4)])
        assert sorted(map(tuple, seen.tolist())) == sorted(map(tuple, attention.tolist()))


def test_labels_ask_for_the_answer_and_the_end_and_nothing_else(recipe: ScratchRecipe, features: FeatureCache) -> None:
    """Walked by hand: a row is taught if and only if the next id stands between <assistant> and <end>."""
    tokenizer = tokenizer_of(features)
    special = special_ids(tokenizer)
    user, assistant, end = special[USER], special[ASSISTANT], special[END]
    text = Batches(recipe, features, tokenizer)(0)[1]
    turns = 0
    for ids, labels, blocks in zip(text.input_ids.tolist(), text.labels.tolist(), text.blocks.tolist(), strict=True):
        answering = False
        for place, token in enumerate(ids):
            if blocks[place] == 0:
                assert labels[place] == IGNORE
                continue
            if token == user:
                turns += 1
                answering = False
            answering = (answering or token == assistant) and token != end
            following = ids[place + 1] if place + 1 < len(ids) else None
            assert labels[place] == (following if answering else IGNORE)
    assert turns > 2


def test_second_turns_share_a_block_with_the_first(recipe: ScratchRecipe, features: FeatureCache) -> None:
    tokenizer = tokenizer_of(features)
    user = special_ids(tokenizer)[USER]
    for share in (0.0, 1.0):
        settings = replace(recipe, optim=replace(recipe.optim, second_turn=share))
        text = Batches(settings, features, tokenizer)(0)[1]
        questions = torch.eq(text.input_ids, user).sum(1)
        blocks = text.blocks.amax(1)
        assert torch.equal(blocks, questions if share == 0 else torch.ones_like(blocks))


def test_norms_and_biases_do_not_decay(recipe: ScratchRecipe, features: FeatureCache) -> None:
    the_run = made_run(recipe, features)
    decayed, spared = (set(map(id, group["params"])) for group in the_run.updater.optimiser.param_groups)
    for name, parameter in the_run.task.module.named_parameters():
        assert (id(parameter) in spared) == ("norm" in name or name.endswith("bias")), name
    assert decayed | spared == {id(parameter) for parameter in the_run.task.module.parameters()}


def test_a_fresh_model_summarises_by_the_mean(recipe: ScratchRecipe, features: FeatureCache) -> None:
    model = made_run(recipe, features).model
    assert model.summary is not None
    tokens = torch.randn(2, 5, 16)
    torch.testing.assert_close(model.summary(tokens), tokens.mean(1, keepdim=True), rtol=0, atol=1e-6)


def test_patches_of_unknown_truth_do_not_count(features: FeatureCache) -> None:
    torch.manual_seed(0)
    tokenizer = tokenizer_of(features)
    head, tokens, words = PatchHead(8, tokenizer), torch.randn(2, 6, 8), torch.randn(tokenizer.get_vocab_size(), 8)
    labels = torch.randint(0, 5, (2, 6), dtype=torch.int16)
    colours = torch.randint(0, 5, (2, 6), dtype=torch.int16)
    labels[1], colours[1] = -1, -1
    known = head(tokens[:1], labels[:1], colours[:1], words)
    torch.testing.assert_close(head(tokens, labels, colours, words), known)
    assert head(tokens, torch.full_like(labels, -1), torch.full_like(colours, -1), words).item() == 0


def test_a_patch_is_scored_against_the_words_for_what_it_shows(features: FeatureCache) -> None:
    """The head scores against the decoder's own embeddings, first of the name and then of the colour."""
    tokenizer = tokenizer_of(features)
    head = PatchHead(8, tokenizer)
    letter, red = LABEL_IDS["A"], COLOUR_IDS["red"]
    words = torch.zeros(tokenizer.get_vocab_size(), 8)
    words[tokenizer.encode("A").ids[0], :4] = torch.tensor([1.0, -1, 1, -1]) * 50
    words[tokenizer.encode(" red").ids[0], 4:] = torch.tensor([1.0, -1, 1, -1]) * 50
    token = torch.tensor([1.0, -1, 1, -1, 1, -1, 1, -1]).view(1, 1, 8)
    loss = head(token, torch.tensor([[letter]]), torch.tensor([[red]]), words)
    # Colours may share their first token in so small a vocabulary, so the bound is the worst case of that.
    assert loss.item() < np.log(len(COLOUR_IDS) + 1)
    assert head(-token, torch.tensor([[letter]]), torch.tensor([[red]]), words).item() > 10


GRID = 4


def place_head(features: FeatureCache) -> tuple[PlaceHead, Tokenizer]:
    """A head that reads the scores of rows and columns straight from the hidden state."""
    tokenizer = tokenizer_of(features)
    head = PlaceHead(2 * (1 + GRID), GRID, tokenizer)
    with torch.no_grad():
        for linear, start in ((head.rows, 0), (head.columns, 1 + GRID)):
            linear.weight.zero_()
            linear.weight[:, start : start + 1 + GRID] = torch.eye(1 + GRID)
            linear.bias.zero_()
    return head, tokenizer


def entropy(shares: list[float]) -> float:
    return -sum(share * math.log(share) for share in shares if share)


def test_a_name_is_scored_by_the_rows_and_columns_of_what_it_names(features: FeatureCache) -> None:
    head, tokenizer = place_head(features)
    star, other = LABEL_IDS["star"], LABEL_IDS["heart"]
    ids = torch.tensor([tokenizer.encode(" star").ids[-1:]])
    assert head.get_buffer("label_of")[ids].item() == star
    labels = torch.full((1, GRID * GRID), other, dtype=torch.int16)
    labels[0, [4, 5, 9]] = star  # rows 1, 1, 2 and columns 0, 1, 1
    rows, columns = [0, 0, 2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3, 0, 0]  # the first is "not there"
    best = torch.tensor([*rows, *columns]).clamp(min=1e-9).log().view(1, 1, -1)
    assert head(best, ids, labels).item() == pytest.approx((entropy(rows) + entropy(columns)) / 2, abs=1e-5)
    assert head(best.roll(1, -1), ids, labels).item() > 5
    absent = torch.tensor([1, 0, 0, 0, 0, 1, 0, 0, 0, 0.0]).clamp(min=1e-9).log().view(1, 1, -1)
    assert head(absent, ids, torch.full_like(labels, other)).item() == pytest.approx(0, abs=1e-5)
    assert head(absent, ids, labels).item() > 5


def test_words_that_name_nothing_and_pictures_of_unknown_truth_have_no_place(features: FeatureCache) -> None:
    head, tokenizer = place_head(features)
    star, what = (tokenizer.encode(word).ids[-1] for word in (" star", "?"))
    hidden = torch.randn(2, 2, 2 * (1 + GRID))
    labels = torch.full((2, GRID * GRID), LABEL_IDS["star"], dtype=torch.int16)
    ids = torch.tensor([[star, what], [star, star]])
    alone = head(hidden[:1, :1], ids[:1, :1], labels[:1])
    unknown = labels.clone()
    unknown[1] = -1
    torch.testing.assert_close(head(hidden, ids, unknown), alone)
    assert head(hidden, torch.full_like(ids, what), labels).item() == 0


def test_a_token_of_several_names_stands_for_none() -> None:
    """A vocabulary of bytes: every name ends in a letter that others end in."""
    letters = train_tokenizer(["x"], 261)
    labels = PlaceHead(4, GRID, letters).get_buffer("label_of")
    assert labels[letters.encode("e").ids[-1]] == 0
    assert len(labels) == letters.get_vocab_size()


def test_every_name_and_letter_of_the_real_vocabulary_has_a_token() -> None:
    tokenizer = train_tokenizer(vocabulary_text(), 1280)
    label_of = PlaceHead(4, GRID, tokenizer).get_buffer("label_of")
    assert set(label_of.tolist()) == set(range(len(LABELS)))
    spelled = tokenizer.encode('It says "STOP".').ids
    assert [LABELS[label] for label in label_of[spelled].tolist() if label] == list("STOP")


def test_the_first_loss_is_that_of_guessing(recipe: ScratchRecipe, features: FeatureCache) -> None:
    the_run = made_run(recipe, features)
    answer, _, _ = the_run.step_once(the_run.task.batch(0))
    vocabulary = the_run.task.tokenizer.get_vocab_size()
    assert answer == pytest.approx(math.log(vocabulary), abs=1.5)


def test_the_place_loss_reaches_the_layers_before_the_middle(
    recipe: ScratchRecipe, features: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    the_run = made_run(recipe, features)
    layers = the_run.model.decoder.layers
    reached: list[bool] = []

    def spy(names: Tensor, input_ids: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG001
        assert names.shape[:2] == input_ids.shape
        for layer in layers:
            query = layer.get_parameter("attention.q.weight")
            (gradient,) = torch.autograd.grad(names.float().square().sum(), query, retain_graph=True, allow_unused=True)
            reached.append(gradient is not None and bool(gradient.abs().sum() > 0))
        return names.sum() * 0

    monkeypatch.setattr(the_run.task.module.place_head, "forward", spy)
    the_run.step_once(the_run.task.batch(0))
    assert reached == [True, False]


def test_alignment_teaches_the_projector_alone(recipe: ScratchRecipe, features: FeatureCache) -> None:
    aligning = replace(recipe, optim=replace(recipe.optim, align_steps=30, align_batch_size=4))
    the_run = made_run(aligning, features)
    before = {name: tensor.clone() for name, tensor in the_run.model.state_dict().items()}
    events: list[Event] = []
    data = features.gather(range(len(features)))

    def patch_loss() -> float:
        tokens, embedding = the_run.model.projector(data["features"].float()), the_run.model.decoder.embed.weight
        head = the_run.task.module.get_submodule("patch_head")
        return float(head(tokens, data["labels"], data["colours"], embedding).detach())

    first = patch_loss()
    the_run.task.align(features, events.append)
    assert done_of(events, ALIGNING) == list(range(1, 31))
    assert patch_loss() < 0.75 * first
    changed = {name for name, tensor in the_run.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.split(".")[0] for name in changed} == {"projector"}


def test_alignment_is_done_once_and_anew_after_a_kill(recipe: ScratchRecipe, tmp_path: Path, cache_root: Path) -> None:
    aligning = replace(recipe, optim=replace(recipe.optim, align_steps=3, align_batch_size=4))
    run(aligning, tmp_path / "whole", cache_root=cache_root)
    run(aligning, tmp_path / "killed", cache_root=cache_root, kill_at=2, kill_stage=ALIGNING)
    run(aligning, tmp_path / "killed", cache_root=cache_root, kill_at=1)
    events = run(aligning, tmp_path / "killed", cache_root=cache_root)
    assert not done_of(events, ALIGNING)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_a_question_too_long_for_the_width_makes_room_for_others(recipe: ScratchRecipe, features: FeatureCache) -> None:
    tokenizer = tokenizer_of(features)
    batches = Batches(recipe, features, tokenizer)
    batches.recipe = replace(recipe, optim=replace(recipe.optim, text_width=24))
    long, short = Question("what", "x" * 80, "y", "y"), Question("what", "What?", "Red.", "red")
    for seed in range(4):
        blocks = batches._blocks([[long, short]], 0, np.random.default_rng(seed))
        assert len(blocks) == 1
        assert blocks[0][0] == batches._turn(short)[0]

"""Samples side by side, padded and packed, cost what each costs alone: rows, loss and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skipvision.config import SkipConfig
from skipvision.decoder import FeedForward
from skipvision.layout import SKIPPED, SUMMARY
from skipvision.model import SkipVisionModel, attention_mask
from skipvision.training.collate import Batch, collate
from skipvision.training.conversation import Broken
from skipvision.training.samples import Sample
from skipvision.training.speaker import IGNORE
from skipvision.training.task import Objective
from skipvision.training.tune import TuneModule
from tests.skipvision import tiny, zoo
from tests.training.shown import Part, loss_alone, sample_of

CONVERSATIONS: dict[str, list[Part]] = {
    "picture-first": [(40, 50), 11, 12, -13, -20],
    "picture-last": [15, (30, 33), -16, -20],
    "text-only": [15, 16, 17, -18, -19, -20],
    "two-pictures-two-answers": [13, (16, 20), 14, (50, 20), 19, -11, 12, 13, -14],
    "pictures-together": [(20, 20), (64, 20), 28, -29],
}
OWN = {**tiny.SKIPS, "random": SkipConfig(5, 4, "random")}
PUBLISHED: dict[str, SkipConfig | None] = {
    "image": SkipConfig(5, 4, "received_attention"),
    "all": SkipConfig(5, 4, "received_attention", "all"),
    "off": None,
}


def own(skip: SkipConfig | None) -> SkipVisionModel:
    return tiny.tiny_model(tiny.tiny_config(skip), dtype=torch.float32)


def published(kind: zoo.Kind, skip: SkipConfig | None) -> SkipVisionModel:
    return deepcopy(zoo.ours(kind)).float().with_skip(skip)


def samples_for(model: SkipVisionModel, image_id: int) -> list[Sample]:
    return [sample_of(name, parts, model.config, image_id) for name, parts in CONVERSATIONS.items()]


def arranged(samples: Sequence[Sample], arrangement: str) -> list[list[Sample]]:
    if arrangement == "padded":
        return [[sample] for sample in samples]
    if arrangement == "packed":
        return [[*samples]]
    return [[*samples[:2]], [*samples[2:]]]


def assert_same_as_alone(model: SkipVisionModel, samples: Sequence[Sample], sequences: list[list[Sample]]) -> None:
    """Loss and all gradients, in fp32."""
    batch = collate(sequences, model.config)
    objective = TuneModule(model)(batch)
    weight = sum(label != IGNORE for sample in samples for label in sample.spoken.labels)
    assert objective.weight == weight == batch.counts.answer_tokens
    alone = sum((loss_alone(model, sample) for sample in samples), torch.zeros(())) / weight
    torch.testing.assert_close(objective.total / weight, alone, rtol=1e-5, atol=1e-5)
    parameters = dict(model.named_parameters())
    ours, theirs = (
        torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
        for loss in (objective.total / weight, alone)
    )
    for name, one, other in zip(parameters, ours, theirs, strict=True):
        # fp32; sums in another order, up to some hundred terms.
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * max(1.0, float(other.abs().max())), msg=name)


@pytest.mark.parametrize("arrangement", ["padded", "packed", "both"])
@pytest.mark.parametrize("skip", tiny.SKIPS.values(), ids=tiny.SKIPS.keys())
def test_a_batch_costs_what_its_samples_cost_alone(skip: SkipConfig | None, arrangement: str) -> None:
    model = own(skip)
    samples = samples_for(model, tiny.IMAGE)
    assert_same_as_alone(model, samples, arranged(samples, arrangement))


@pytest.mark.parametrize("arrangement", ["padded", "both"])
@pytest.mark.parametrize("skip", PUBLISHED.values(), ids=PUBLISHED.keys())
@pytest.mark.parametrize("kind", zoo.KINDS, ids=lambda kind: kind.name)
def test_a_batch_for_a_published_model_costs_what_its_samples_cost_alone(
    kind: zoo.Kind, skip: SkipConfig | None, arrangement: str
) -> None:
    model = published(kind, skip)
    samples = samples_for(model, zoo.IMAGE)
    assert_same_as_alone(model, samples, arranged(samples, arrangement))


@pytest.mark.parametrize("skip", tiny.SKIPS.values(), ids=tiny.SKIPS.keys())
def test_rows_see_their_own_sample_alone_and_padding_is_seen_by_none(skip: SkipConfig | None) -> None:
    model = own(skip)
    samples = samples_for(model, tiny.IMAGE)
    batch = collate([samples[:3], samples[3:4], samples[4:]], model.config)
    mask = attention_mask(batch.order, batch.visible_until)[:, 0]
    assert mask.any(-1).all()  # or else its softmax is not a number
    assert mask.diagonal(dim1=1, dim2=2).all()
    for row, sequence in enumerate([samples[:3], samples[3:4], samples[4:]]):
        expected, is_real = _mask_by_rule(sequence, batch, row)
        assert (mask[row][is_real][:, is_real] == expected).all()
        assert not mask[row][is_real][:, ~is_real].any()


def _mask_by_rule(sequence: Sequence[Sample], batch: Batch, row: int) -> tuple[Tensor, Tensor]:
    """Who sees whom, worked out row by row; and which columns hold rows."""
    rows = []  # sample, position, kind, image
    for number, sample in enumerate(sequence):
        position = 0
        for image, segment in enumerate(sample.layout.segments):
            length = segment if isinstance(segment, int) else segment.length
            kinds = sample.layout.kinds[position : position + length].tolist()
            rows += [(number, position + place, kind, image) for place, kind in enumerate(kinds)]
            position += length
    rows.sort(key=lambda each: each[2] == SKIPPED)
    kept = sum(each[2] != SKIPPED for each in rows)
    is_real = torch.zeros(batch.source.shape[1], dtype=torch.bool)
    is_real[:kept] = True
    is_real[batch.num_kept : batch.num_kept + len(rows) - kept] = True
    assert batch.positions[row][is_real].tolist() == [each[1] for each in rows]
    seen_by_all = sequence[0].layout.visibility == "all"
    expected = [
        [
            query[0] == key[0] and key[1] <= query[1] and (key[2] != SKIPPED or seen_by_all or (query[3] == key[3]))
            for key in rows
        ]
        for query in rows
    ]
    return torch.tensor(expected), is_real


@pytest.mark.parametrize("skip", tiny.SKIPS.values(), ids=tiny.SKIPS.keys())
def test_a_mask_is_left_out_where_it_would_say_no_more_than_causality(
    monkeypatch: pytest.MonkeyPatch, skip: SkipConfig | None
) -> None:
    model = own(skip)
    samples = samples_for(model, tiny.IMAGE)
    text = samples[2]
    assert text.name == "text-only"
    is_plain = skip is None or skip.num_skipped == 0
    masks: list[Tensor | None] = []
    run = model.decoder.forward

    def spied(hidden: Tensor, positions: Tensor, mask: Tensor | None, num_kept: int) -> Tensor:
        masks.append(mask)
        return run(hidden, positions, mask, num_kept)

    monkeypatch.setattr(model.decoder, "forward", spied)
    for sequences, is_causal in (
        ([[each] for each in samples], is_plain),  # padded
        ([[text], [text]], True),
        ([[text, text]], False),
        ([samples], False),
        ([], True),
    ):
        batch = collate(sequences, model.config)
        loss = TuneModule(model)(batch).total
        assert (masks.pop() is None, batch.is_causal) == (is_causal, is_causal)
        with_mask = TuneModule(model)(replace(batch, is_causal=False)).total
        assert masks.pop() is not None
        torch.testing.assert_close(loss, with_mask, rtol=1e-6, atol=1e-6)


def test_counts_and_names() -> None:
    model = own(tiny.MERGED)
    samples = samples_for(model, tiny.IMAGE)
    broken = [Broken("nine", "no picture")]
    batch = collate([samples[:2], [], samples[2:]], model.config, broken)
    assert batch.names == tuple(CONVERSATIONS)
    assert batch.broken == tuple(broken)
    counts = batch.counts
    pictures = 6
    assert (counts.samples, counts.answer_tokens) == (5, 2 + 2 + 3 + 2 + 1)
    assert counts.visual_rows == pictures * (5 + 4 + 2)
    assert counts.visual_kept == pictures * (5 + 2)
    assert counts.visual_plain == pictures * tiny.NUM_PATCHES
    assert counts.rows == counts.visual_rows + 4 + 3 + 6 + 7 + 2
    assert len(batch.input_ids) == 2
    assert len(batch.pixels) == len(batch.cuts) == pictures


def test_a_label_behind_a_picture_is_said_by_its_last_row() -> None:
    model = own(tiny.MERGED)
    sample = sample_of("last", [15, (30, 33), -16, -20], model.config, tiny.IMAGE)
    batch = collate([[sample]], model.config)
    # Kept: the id, 5 retained, the first summary, the second one, and two ids.
    assert batch.labels.tolist() == [[IGNORE] * 7 + [16, 20, IGNORE]]
    assert sample.layout.kinds[sample.layout.positions[7]] == SUMMARY


def test_questions_are_no_labels() -> None:
    model = own(tiny.MERGED)
    batch = collate([[each] for each in samples_for(model, tiny.IMAGE)], model.config)
    assert sorted(batch.labels[batch.labels != IGNORE].tolist()) == sorted([13, 20, 16, 20, 18, 19, 20, 11, 14, 29])


def test_nothing_at_all_has_a_loss_of_no_weight_and_no_gradient() -> None:
    model = own(tiny.MERGED)
    objective = TuneModule(model)(collate([], model.config))
    assert (objective.weight, objective.total.item()) == (0, 0)
    objective.total.backward()
    for layer in model.decoder.layers:
        assert all(each.grad is not None and not each.grad.any() for each in layer.parameters())


def test_text_alone_passes_no_encoder() -> None:
    model = own(tiny.MERGED)
    batch = collate([[sample_of("text", CONVERSATIONS["text-only"], model.config, tiny.IMAGE)]], model.config)
    objective = TuneModule(model)(batch)
    objective.total.backward()
    assert objective.weight == 3
    assert all(each.grad is None for each in model.vision.parameters())


def test_text_alone_asks_the_layers_for_gradients_even_where_the_projector_alone_learns() -> None:
    """Or else processes that share layers would wait for one another."""
    model = own(tiny.MERGED)
    model.vision.requires_grad_(False)
    model.decoder.requires_grad_(False)
    batch = collate([[sample_of("text", CONVERSATIONS["text-only"], model.config, tiny.IMAGE)]], model.config)
    passed: list[bool] = []
    model.decoder.layers[0].register_full_backward_hook(lambda *_: passed.append(True))
    TuneModule(model)(batch).total.backward()
    assert passed == [True]
    for part in (model.projector, model.summary):
        assert part is not None
        assert all(each.grad is not None and not each.grad.any() for each in part.parameters())


@pytest.mark.parametrize("skip", [tiny.MERGED, tiny.SKIPS["merged-seen-by-all"]], ids=["image", "all"])
def test_skipped_rows_pass_no_ffn(skip: SkipConfig) -> None:
    model = own(skip)
    samples = samples_for(model, tiny.IMAGE)
    batch = collate([samples[:3], samples[3:]], model.config)
    rows: list[int] = []
    linears = [part for module in model.modules() if isinstance(module, FeedForward) for part in module.children()]
    for linear in linears:
        linear.register_forward_pre_hook(lambda _module, given: rows.append(given[0].shape[:2].numel()))
    TuneModule(model)(batch).total.backward()
    kept = [sum(sample.layout.num_kept for sample in each) for each in (samples[:3], samples[3:])]
    assert len(linears) == 3 * model.config.text.num_layers
    assert rows == [2 * max(kept)] * len(linears)
    assert batch.num_kept == max(kept) < batch.source.shape[1]


def test_the_random_selector_draws_from_torch() -> None:
    """So that whoever seeds that before each micro-batch knows what is drawn."""
    model = own(SkipConfig(5, 4, "random"))
    samples = samples_for(model, tiny.IMAGE)

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        objective: Objective = TuneModule(model)(collate([[each] for each in samples], model.config))
        return objective.total.item()

    assert loss(1) == loss(1) != loss(2)


def test_only_rows_that_have_something_to_say_reach_the_head() -> None:
    model = own(tiny.MERGED)
    batch = collate([[each] for each in samples_for(model, tiny.IMAGE)], model.config)
    rows: list[int] = []
    model.decoder.head.register_forward_pre_hook(lambda _module, given: rows.append(len(given[0])))
    TuneModule(model)(batch)
    assert rows == [batch.counts.answer_tokens]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.sampled_from(sorted(CONVERSATIONS)), max_size=4), max_size=4), st.sampled_from([*OWN]))
def test_any_arrangement_has_all_rows_once(names: list[list[str]], skip: str) -> None:
    config = tiny.tiny_config(OWN[skip])
    sequences = [[sample_of(name, CONVERSATIONS[name], config, tiny.IMAGE) for name in each] for each in names]
    batch = collate(sequences, config)
    longest = max((sum(sample.layout.length for sample in each) for each in sequences), default=0)
    taken = batch.source[batch.order < max(longest, 1)]  # padding stands behind the longest
    num_ids = batch.input_ids.numel()
    assert sorted((taken[taken >= num_ids] - num_ids).tolist()) == list(range(batch.counts.visual_rows))
    assert len(taken) == max(batch.counts.rows, 1)
    said = batch.labels[batch.labels != IGNORE].tolist()
    due = [label for each in sequences for sample in each for label in sample.spoken.labels if label != IGNORE]
    assert sorted(said) == sorted(due)

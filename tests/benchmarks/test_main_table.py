"""Each rival against a loop that does what its rule says, and the table's own machinery on a tiny run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import main_table, main_variants
from benchmarks.answering import answers_by_picture, answers_by_question, decode, visibility_of
from benchmarks.main_table import Bench, Plan
from benchmarks.main_variants import VARIANTS, Variant, fastv_flops
from benchmarks.received import Received
from benchmarks.rivals import (
    Rival,
    average_pool,
    hide_skipped,
    prefill_fastv,
    prefill_whole,
    random_drop,
    visionzip,
    without_summary,
)
from skipvision.checkpoint import save_checkpoint
from skipvision.config import SkipConfig, Visibility
from skipvision.cost import merge_flops
from skipvision.data.questions import Question
from skipvision.layout import BatchLayout, ImageSpan, TokenLayout
from skipvision.model import SkipVisionModel
from skipvision.tokenizer import CHAT_TEMPLATE, train_tokenizer
from skipvision.training.distributed import Processes
from skipvision.training.evaluate import answer_all
from skipvision.training.feature_cache import FeatureCache
from skipvision.training.scratch import ScratchModule, initialise
from skipvision.training.scratch_recipe import ScratchRecipe
from skipvision.training.state import Progress, States
from skipvision.vision import VisionEncoder
from tests.skipvision import reference
from tests.skipvision.reference import RETAINED, TEXT, Row
from tests.skipvision.tiny import IMAGE, MERGED, NUM_PATCHES, TOLERANCE, batch_of, tiny_config, tiny_model

CLOSE = TOLERANCE[torch.float64]
PROMPTS = [[IMAGE, 7, 8, 9], [IMAGE, 5], [IMAGE, 21, 22, 23, 24]]


def tokens_and_attention() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randn(2, NUM_PATCHES, 32, generator=generator, dtype=torch.float64)
    return tokens, torch.rand(2, NUM_PATCHES, generator=generator, dtype=torch.float64)


def test_random_drop_leaves_as_many_tokens_in_raster_order_and_other_ones_each_time() -> None:
    tokens, attention = tokens_and_attention()
    drawn = []
    for seed in range(5):
        rows = random_drop(6)(tokens, attention, torch.Generator().manual_seed(seed))
        for image in range(2):
            found = [int((tokens[image] == row).all(1).nonzero()) for row in rows[image]]
            assert len(found) == 6
            assert found == sorted(set(found))
            drawn.append(tuple(found))
    assert len(set(drawn)) > 5


def test_average_pooling_is_the_mean_of_each_window() -> None:
    tokens, attention = tokens_and_attention()
    grid = tokens.view(2, 4, 4, 32)
    halves = average_pool(2)(tokens, attention, None)
    thirds = average_pool(3)(tokens, attention, None)
    # A window of 4 / 3 patches takes in every patch that it touches.
    spans = {2: [(0, 2), (2, 4)], 3: [(0, 2), (1, 3), (2, 4)]}
    for side, rows in ((2, halves), (3, thirds)):
        for row, (top, bottom) in enumerate(spans[side]):
            for column, (left, right) in enumerate(spans[side]):
                window = grid[:, top:bottom, left:right].flatten(1, 2).mean(1)
                torch.testing.assert_close(rows[:, row * side + column], window)


@pytest.mark.parametrize(("dominant", "contextual"), [(5, 3), (4, 4), (1, 1), (15, 1)])
def test_visionzip_merges_what_cls_overlooks_into_an_even_stride_of_it(dominant: int, contextual: int) -> None:
    tokens, attention = tokens_and_attention()
    rows = visionzip(dominant, contextual)(tokens, attention, None)
    for image in range(2):
        vectors = tokens[image].numpy()
        order = attention[image].argsort(descending=True).tolist()
        best = sorted(order[:dominant])
        others = sorted(order[dominant:])
        targets = others[:: len(others) // contextual][:contextual]
        clusters = {target: [vectors[target]] for target in targets}
        for other in others:
            if other not in targets:
                cosines = [
                    vectors[other] @ vectors[target] / np.linalg.norm(vectors[other]) / np.linalg.norm(vectors[target])
                    for target in targets
                ]
                clusters[targets[int(np.argmax(cosines))]].append(vectors[other])
        expected = [*(vectors[place] for place in best), *(np.mean(clusters[target], 0) for target in targets)]
        # Shares are fp32.
        np.testing.assert_allclose(rows[image].numpy(), np.array(expected), atol=1e-6)


def test_without_summary_the_rows_are_those_of_skip_vision_without_its_summaries() -> None:
    tokens, attention = tokens_and_attention()
    whole = tiny_model(tiny_config(MERGED)).split(tokens, attention)
    bare = without_summary(MERGED.num_retained, MERGED.num_skipped)(tokens, attention, None)
    kinds = ImageSpan(MERGED.num_retained, MERGED.num_skipped, 2).kinds
    torch.testing.assert_close(bare, whole[:, [kind != 2 for kind in kinds]])


def test_without_merging_all_that_is_not_retained_is_skipped_as_it_is() -> None:
    tokens, attention = tokens_and_attention()
    model = VARIANTS["no-merge"]
    assert "256" not in model.title
    skip = SkipConfig(5, NUM_PATCHES - 5)
    rows = tiny_model(tiny_config(skip)).split(tokens, attention)
    top = sorted(attention[0].topk(5).indices.tolist())
    rest = [place for place in range(NUM_PATCHES) if place not in top]
    torch.testing.assert_close(rows[0, :5], tokens[0, top])
    torch.testing.assert_close(rows[0, 6:-1], tokens[0, rest])


@pytest.mark.parametrize("visibility", ["image", "all"])
@pytest.mark.parametrize("hidden", [False, True])
def test_a_whole_cache_decodes_as_one_pass_over_all_rows_does(visibility: Visibility, hidden: bool) -> None:
    """Hidden rows are seen by no answer, as evicted ones are not; else whoever may see them does."""
    model = tiny_model(tiny_config(replace(MERGED, visibility=visibility)))
    ready = batch_of(model, PROMPTS)
    logits, cache = prefill_whole(model, ready.input_ids, ready.visual, ready.batch, 40)
    if hidden or visibility == "image":
        hide_skipped(cache, MERGED.num_skipped)
    forced = [11, 12, 13]
    said = [logits, *(decode(model, torch.full((len(PROMPTS), 1), each), cache)[:, 0] for each in forced)]
    weights = reference.weights_of(model)
    for row, prompt in enumerate(ready.rows):
        expected = reference.continuation(weights, model.config.text, prompt, forced, visibility, evict=hidden)
        np.testing.assert_allclose(torch.stack(said)[:, row].numpy(), expected, atol=CLOSE, rtol=CLOSE)


def test_eviction_changes_nothing_where_only_the_image_sees_skipped_rows_and_something_where_all_do() -> None:
    cases: dict[Visibility, bool] = {"image": True, "all": False}
    for visibility, same in cases.items():
        model = tiny_model(tiny_config(replace(MERGED, visibility=visibility)))
        ready = batch_of(model, PROMPTS)
        _, evicted = model.prefill(ready.input_ids, ready.visual, ready.batch, 40)
        _, whole = prefill_whole(model, ready.input_ids, ready.visual, ready.batch, 40)
        if visibility == "image":
            hide_skipped(whole, MERGED.num_skipped)
        ids = torch.full((len(PROMPTS), 1), 11)
        assert torch.allclose(decode(model, ids, evicted), decode(model, ids, whole), atol=1e-12) == same


@pytest.mark.parametrize("after", [1, 2])
def test_fastv_drops_what_the_last_row_looks_at_least(after: int) -> None:
    num_left = 6
    model = tiny_model(replace(tiny_config(None), text=replace(tiny_config().text, num_layers=3)))
    ready = batch_of(model, PROMPTS)
    logits, cache = prefill_fastv(model, ready.input_ids, ready.visual, ready.batch, 40, num_left=num_left, after=after)
    forced = [11, 12]
    said = [logits, *(decode(model, torch.full((len(PROMPTS), 1), each), cache)[:, 0] for each in forced)]
    weights = reference.weights_of(model)
    choices = []
    for row, prompt in enumerate(ready.rows):
        tail = [Row(weights["decoder.embed.weight"][token], TEXT) for token in forced]
        expected, chosen = fastv_in_loops(weights, model, [*prompt, *tail], len(prompt), num_left, after)
        np.testing.assert_allclose(torch.stack(said)[:, row].numpy(), expected, atol=CLOSE, rtol=CLOSE)
        choices.append(chosen)
    assert len({tuple(each) for each in choices}) > 1


def fastv_in_loops(
    weights: reference.Weights, model: SkipVisionModel, rows: list[Row], num_prompt: int, num_left: int, after: int
) -> tuple[np.ndarray, list[int]]:
    """Logits of the prompt's last row and of those behind it; and which visual rows are left. Nothing is dropped:
    later layers do not look."""
    config = model.config.text
    size, shared = config.head_dim, config.num_heads // config.num_kv_heads
    picture = [place for place, row in enumerate(rows) if row.kind == RETAINED]
    hidden = [row.vector for row in rows]
    left = picture
    for number in range(config.num_layers):
        name, eps = f"decoder.layers.{number}", config.rms_norm_eps
        normed = [reference.rms_norm(row, weights[f"{name}.norm1.weight"], eps) for row in hidden]
        if number == after - 1:
            last = num_prompt - 1
            paid = np.zeros(num_prompt)
            query = reference.linear(weights, f"{name}.attention.q", normed[last]).reshape(config.num_heads, size)
            for head in range(config.num_heads):
                turned = reference.rotate(query[head], last, config.rope_theta)
                scores = []
                for place in range(num_prompt):
                    key = reference.linear(weights, f"{name}.attention.k", normed[place])
                    key = key.reshape(config.num_kv_heads, size)[head // shared]
                    scores.append(float(turned @ reference.rotate(key, place, config.rope_theta)) / math.sqrt(size))
                paid += reference.softmax(scores) / config.num_heads
            left = sorted(sorted(picture, key=lambda place: -paid[place])[:num_left])
        seen = set(range(len(rows))) - (set(picture) - set(left) if number >= after else set())
        visible = [[key for key in range(place + 1) if key in seen or key == place] for place in range(len(rows))]
        mixed, _ = reference._attend(weights, f"{name}.attention", config, normed, visible)
        hidden = [row + more for row, more in zip(hidden, mixed, strict=True)]
        norm2 = weights[f"{name}.norm2.weight"]
        hidden = [row + reference.swiglu(weights, f"{name}.ffn", reference.rms_norm(row, norm2, eps)) for row in hidden]
    final = weights["decoder.norm.weight"]
    ends = [reference.rms_norm(row, final, config.rms_norm_eps) for row in hidden[num_prompt - 1 :]]
    return np.array([reference.linear(weights, "decoder.head", row) for row in ends]), left


def test_fastv_that_leaves_everything_is_the_plain_model() -> None:
    model = tiny_model(tiny_config(None))
    ready = batch_of(model, PROMPTS)
    plain, _ = model.prefill(ready.input_ids, ready.visual, ready.batch, 40)
    whole, _ = prefill_fastv(model, ready.input_ids, ready.visual, ready.batch, 40, num_left=NUM_PATCHES, after=1)
    torch.testing.assert_close(whole, plain)


def counted(call: Callable[[], object]) -> int:
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def test_flops_of_fastv_are_those_that_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main_variants, "KEPT", 6)
    model = tiny_model(replace(tiny_config(None), text=replace(tiny_config().text, num_layers=4)))
    ready = batch_of(model, [[IMAGE, 7, 8, 9]])

    def call() -> object:
        return prefill_fastv(model, ready.input_ids, ready.visual, ready.batch, 40, num_left=6)

    assert counted(call) == fastv_flops(model.config.text, NUM_PATCHES, 3)


def test_flops_of_visionzip_and_of_bare_skipping_are_those_that_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, attention = tokens_and_attention()
    config, one = tiny_config(None), (tokens[:1], attention[:1], None)
    ranking = main_variants.cls_flops(config)
    monkeypatch.setattr(main_variants, "DOMINANT", 5)
    monkeypatch.setattr(main_variants, "CONTEXTUAL", 3)
    monkeypatch.setattr(main_variants, "MIDDLE", (5, 4))
    assert counted(lambda: visionzip(5, 3)(*one)) == main_variants.zip_flops(config) - ranking
    bare = counted(lambda: without_summary(5, 4)(*one))
    assert bare == main_variants.bare_flops(config) - ranking
    assert bare == merge_flops(32, NUM_PATCHES, 5, 4) - 4 * 32 * 9


def speaking_model(recipe: ScratchRecipe, features: FeatureCache, skip: SkipConfig | None) -> SkipVisionModel:
    """Weights so large that rounding turns no answer."""
    torch.manual_seed(0)
    text = replace(recipe.model.text, vocab_size=300, tie_embeddings=False, num_layers=3)
    model = SkipVisionModel(replace(recipe.model, text=text, skip=skip))
    initialise(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20 if parameter.dim() > 1 else 1)
    assert len(features) == 8
    return model.double().eval()


def asked_of(features: FeatureCache) -> list[tuple[int, Question]]:
    return [(index, question) for index in range(len(features)) for question in features.questions[index][0]]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("visibility", ["image", "all", None])
def test_questions_that_share_a_picture_get_the_answers_they_get_alone(
    recipe: ScratchRecipe, features: FeatureCache, visibility: Visibility | None, batch_size: int
) -> None:
    tokenizer = train_tokenizer([question.question for _, question in asked_of(features)], 300)
    skip = None if visibility is None else SkipConfig(6, 4, visibility=visibility)
    model = speaking_model(recipe, features, skip)
    alone = answer_all(model, tokenizer, features, asked_of(features))
    shared = answers_by_picture(model, tokenizer, features, range(len(features)), batch_size=batch_size)
    assert shared == alone
    assert len({each.answer for each in shared}) > 1
    if visibility is None:
        questions = answers_by_question(
            model, tokenizer, features, range(len(features)), SkipVisionModel.prefill, batch_size=5 * batch_size
        )
        assert questions == alone


def test_answers_with_and_without_eviction(recipe: ScratchRecipe, features: FeatureCache) -> None:
    """Identical where only the image sees skipped rows; not where all do."""
    tokenizer = train_tokenizer([question.question for _, question in asked_of(features)], 300)
    cases: dict[Visibility, bool] = {"image": True, "all": False}
    for visibility, same in cases.items():
        model = speaking_model(recipe, features, SkipConfig(6, 10, visibility=visibility))
        said = [
            answers_by_picture(model, tokenizer, features, range(len(features)), evicts=evicts)
            for evicts in (True, False)
        ]
        assert (said[0] == said[1]) == same


def test_received_scores_are_those_of_the_encoder(
    recipe: ScratchRecipe, features: FeatureCache, encoder: VisionEncoder
) -> None:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(8)]
    asked: list[int] = []

    def image(index: int) -> Image.Image:
        asked.append(index)
        return images[index]

    cache = Received(features, encoder, image)
    first, again = cache.gather([3, 1, 3]), cache.gather([1, 5])
    assert asked == [3, 1, 5]
    assert torch.equal(first["cls_attention"][1], again["cls_attention"][0])
    assert torch.equal(first["features"], features.gather([3, 1, 3])["features"])
    # Each of 2 heads spreads what each of 257 rows pays; what CLS receives of it is not a patch's.
    assert 1.5 < float(first["cls_attention"][0].sum()) < 2
    assert not torch.allclose(first["cls_attention"], features.gather([3, 1, 3])["cls_attention"])
    assert len(cache) == recipe.data.num_scenes


@pytest.fixture
def small(recipe: ScratchRecipe, monkeypatch: pytest.MonkeyPatch) -> dict[str, Variant]:
    """The variants that a model of 256 narrow patches can have in no time."""
    kept = {"dense", "skip-small", "random-drop", "zip", "fastv", "no-summary-seen", "seen-by-all-kept", "seen-by-all"}
    chosen = {name: variant for name, variant in VARIANTS.items() if name in {*kept, "blind"}}
    monkeypatch.setattr(main_table, "VARIANTS", chosen)
    monkeypatch.setattr(main_table, "TEST_PICTURES", 3)
    monkeypatch.setattr(main_table, "QUESTIONS", 3)
    assert recipe.model.vision.num_patches == 256
    return chosen


@pytest.fixture
def plan(
    recipe: ScratchRecipe, art: object, encoder: VisionEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Plan:
    """A base with random weights, and two steps behind it."""
    monkeypatch.setattr("skipvision.data.assets.load", lambda _root: art)
    tokenizer = train_tokenizer(["What is in the picture? There is a red circle."], 300)
    dense = replace(
        recipe.model, skip=None, text=replace(recipe.model.text, vocab_size=tokenizer.get_vocab_size(), num_layers=3)
    )
    torch.manual_seed(0)
    model = SkipVisionModel(dense)
    initialise(model)
    model.vision.load_state_dict(encoder.state_dict())
    folder = tmp_path / "runs" / "base"
    files = {"tokenizer.json": tokenizer.to_str(), "chat_template.jinja": CHAT_TEMPLATE}
    save_checkpoint(model, folder / "checkpoint", files)
    module = ScratchModule(recipe, model, tokenizer)
    optimiser = torch.optim.AdamW(module.parameters())
    States(folder / "states", {"recipe": "base"}, 0, 1, Processes()).save(Progress(6), module, optimiser)
    second = replace(recipe, assets=str(tmp_path), model=replace(recipe.model, skip=None))
    second = replace(second, optim=replace(recipe.optim, steps=2, warmup_steps=1, text_width=160), save_every=1)
    return Plan(second, (0, 1), tmp_path / "runs", tmp_path / "cache", tmp_path / "main_table.json", 1, 6)


def test_a_table_is_made_and_gone_on_with(plan: Plan, small: dict[str, Variant]) -> None:
    main_table.work(Bench(plan), list(small))
    results = json.loads(plan.results.read_text(encoding="utf-8"))
    assert set(results["variants"]) == set(small)
    assert all(set(row["seeds"]) == {"0", "1"} for row in results["variants"].values())
    dense, skipped = results["variants"]["dense"], results["variants"]["skip-small"]
    assert (dense["prefill_rows"], dense["cache_rows"]) == (256, 256)
    assert (skipped["prefill_rows"], skipped["cache_rows"]) == (66, 26)
    assert results["variants"]["fastv"]["prefill_rows"] == pytest.approx((2 * 256 + 46) / 3, rel=1e-4)
    assert results["variants"]["blind"]["prefill_rows"] == 0
    assert dense["flops"] > results["variants"]["fastv"]["flops"] > results["variants"]["blind"]["flops"]
    assert 0 <= results["variants"]["seen-by-all-kept"]["seeds"]["0"]["same_answers"] <= 1

    forgotten = results["variants"]["dense"]["seeds"].pop("1")
    plan.results.write_text(json.dumps(results), encoding="utf-8")
    before = (plan.folder("dense", 1) / "checkpoint" / "weights.safetensors").stat().st_mtime_ns
    main_table.work(Bench(plan), list(small))
    again = json.loads(plan.results.read_text(encoding="utf-8"))
    assert again["variants"]["dense"]["seeds"]["1"] == forgotten
    assert (plan.folder("dense", 1) / "checkpoint" / "weights.safetensors").stat().st_mtime_ns == before

    with pytest.raises(SystemExit, match="another plan"):
        main_table.read_results(replace(plan, base_steps=7))


def test_every_trained_variant_learns_from_the_same_batches_and_begins_as_the_base(
    plan: Plan, small: dict[str, Variant]
) -> None:
    bench = Bench(plan)
    seen = []
    for name in ("dense", "skip-small", "blind"):
        model = bench.fresh(small[name])
        task = bench.task(small[name], model, 1)
        batch = task.batch(0)
        seen.append((batch.data["features"], batch.text.input_ids, batch.text.labels))
        assert batch.layout.length == (0 if name == "blind" else model.span.length)
        learned = dict(model.named_parameters())
        heads = task.module.state_dict()
        assert {key.split(".")[0] for key in bench.heads} == {"patch_head", "place_head"}
        assert all(torch.equal(heads[key], each) for key, each in bench.heads.items())
        for key, weight in bench.base.named_parameters():
            assert torch.equal(learned[key], weight)
            assert learned[key].data_ptr() != weight.data_ptr()
    assert all(torch.equal(*pair) for other in seen[1:] for pair in zip(seen[0], other, strict=True))
    other_seed = bench.task(small["dense"], bench.fresh(small["dense"]), 0)
    assert not torch.equal(other_seed.batch(0).text.input_ids, seen[0][1])


def test_a_killed_variant_goes_on_to_the_same_weights(
    plan: Plan, small: dict[str, Variant], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(plan)
    whole = bench.trained("skip-small", 0).state_dict()
    folder, variant = plan.folder("skip-small", 1), small["skip-small"]

    class Killed(Exception):
        pass

    with monkeypatch.context() as patched:
        patched.setattr(States, "save", then_raising(States.save, Killed))
        with pytest.raises(Killed):
            bench.train(variant, bench.fresh(variant), 0, folder)
    assert [path.name for path in (folder / "states").iterdir()] == ["step-000001"]
    again = bench.fresh(variant)
    bench.train(variant, again, 0, folder)
    assert not (folder / "states").exists()
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, whole[name], rtol=0, atol=0)


def then_raising(save: Callable[..., Path], error: type[Exception]) -> Callable[..., Path]:
    """Saves, and then fails as a kill would."""

    def saved(*values: Any) -> Path:
        save(*values)
        raise error

    return saved


def test_what_another_worker_is_at_is_left_to_it(plan: Plan, small: dict[str, Variant]) -> None:
    with (
        main_table.locked(plan.folder("dense", 0) / "lock"),
        main_table.locked(plan.folder("dense", 0) / "lock", wait=False) as ours,
    ):
        assert not ours
    with main_table.locked(plan.folder("dense", 0) / "lock", wait=False) as ours:
        assert ours
    assert not main_table.is_ready(plan, "zip", 0)
    assert main_table.is_ready(plan, "dense", 0)
    assert not main_table.is_done(plan, "dense", 0)
    assert "zip" in small


def test_times_are_taken_of_every_variant(plan: Plan, small: dict[str, Variant]) -> None:
    main_table.measure(Bench(plan), list(small), 1, 1)
    times = json.loads(plan.results.read_text(encoding="utf-8"))["times"]
    assert set(times["first_token"]) == set(small)
    assert set(times["step"]) == {name for name, variant in small.items() if not variant.weights_of}
    assert all(each["median"] > 0 for part in ("step", "first_token") for each in times[part].values())


def test_a_rival_says_who_sees_its_rows() -> None:
    model = Rival(tiny_config(None), ImageSpan(5, 4), without_summary(5, 4), "all")
    assert visibility_of(model) == "all"
    assert visibility_of(tiny_model()) == "image"
    assert TokenLayout((model.span,), "all").length == 9
    assert BatchLayout.of([TokenLayout((model.span, 2))], 3).num_kept == 7

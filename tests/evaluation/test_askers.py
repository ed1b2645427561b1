"""A bundle and its baselines: what the decoder reads is what each says, held against PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from skipvision.checkpoint import load_checkpoint
from skipvision.cost import prompt_cost
from skipvision.layout import ImageSpan, TokenLayout
from svcli.engines import EngineName
from svcli.evaluation.asker import Said
from svcli.evaluation.askers import BASELINES, AskerError, BundleAsker, full_name, own_name
from svcli.evaluation.session import _MATTERS
from svcli_engines.base import EngineError, Logits, Visual, check_prefill
from svcli_engines.question import Question
from svcli_engines.torch_engine import TorchEngine
from svcli_export.bundle import export_bundle
from svcli_export.chat import Message
from svcli_export.manifest import Manifest, load_manifest
from tests.export.tiny import tiny_checkpoint

ASKED = "What is this?"
Rows = np.ndarray[tuple[int, int, int], np.dtype[np.float32]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("askers") / "checkpoint")


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    export_bundle(checkpoint, checkpoint.with_name("bundle"), precision="fp32", max_context=96, max_images=2)
    return checkpoint.with_name("bundle")


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    return load_manifest(bundle)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (40, 40, 3), np.uint8)) for _ in range(2)]


def said_by(name: str, bundle: Path, pictures: list[Image.Image], engine: EngineName = EngineName.ONNXRUNTIME) -> Said:
    asker = BundleAsker(name, bundle, load_manifest(bundle), engine)
    try:
        return asker.answer(ASKED, pictures, 12)
    finally:
        asker.close()


def names(manifest: Manifest) -> list[str]:
    return [own_name(manifest), *(full_name(name, manifest) for name in BASELINES)]


def test_baselines_leave_as_many_rows_as_the_bundle_keeps(manifest: Manifest) -> None:
    # 16 tokens of a picture, of which 4 are retained beside 2 summaries.
    assert names(manifest) == ["skipped", "dense", "random:6", "pool:4", "blind"]


def by_hand(
    checkpoint: Path, bundle: Path, pictures: list[Image.Image], count: int, reduce: Callable[[Rows], Rows]
) -> list[int]:
    """12 greedy ids of PyTorch on the plain model, with `reduce` of what its encoder says, and no row beside."""
    manifest = load_manifest(bundle).variant("dense")
    engine = TorchEngine(load_checkpoint(checkpoint).with_skip(None), capacity=manifest.contract.capacity)
    asker = BundleAsker("dense", bundle, load_manifest(bundle))
    question = Question(asker.processor, [Message("user", ASKED, images=len(pictures))], pictures)
    asker.close()
    rows = np.concatenate([reduce(engine.encode(each.views).rows) for each in question.pictures])
    layout = question.prompt.layout
    segments = tuple(each if isinstance(each, int) else ImageSpan(count) for each in layout.segments)
    logits: Logits = engine.prefill(question.prompt.ids, Visual(rows), TokenLayout(segments, layout.visibility))
    ids: list[int] = []
    for _ in range(12):
        said = asker.processor.sayable(logits)
        ids.append(int(said.argmax()))
        if ids[-1] in asker.processor.stop_ids:
            return ids[:-1]
        logits = engine.extend([ids[-1]])
    return ids


@pytest.mark.parametrize("num_pictures", [1, 2])
def test_pooling_is_that_of_pytorch(
    checkpoint: Path, bundle: Path, manifest: Manifest, pictures: list[Image.Image], num_pictures: int
) -> None:
    def pooled(rows: Rows) -> Rows:
        grid = torch.from_numpy(rows).reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
        cells = torch.nn.functional.adaptive_avg_pool2d(grid, 3)
        return cells.permute(0, 2, 3, 1).reshape(1, 9, -1).numpy()

    shown = pictures[:num_pictures]
    ids = by_hand(checkpoint, bundle, shown, 9, pooled)
    said = said_by("pool:9", bundle, shown)
    assert said.visual_tokens == 9 * num_pictures
    assert said.text == BundleAsker("dense", bundle, manifest).processor.decode(ids)


def test_random_drop_leaves_what_it_says(checkpoint: Path, bundle: Path, pictures: list[Image.Image]) -> None:
    said = said_by("random:6", bundle, pictures[:1])
    (kept,) = said.retained
    assert len(set(kept)) == 6
    assert sorted(kept) == list(kept)
    ids = by_hand(checkpoint, bundle, pictures[:1], 6, lambda rows: rows[:, list(kept)])
    dense = BundleAsker("dense", bundle, load_manifest(bundle))
    assert said.text == dense.processor.decode(ids)
    assert said_by("random:6", bundle, pictures[:1]).retained == said.retained, "the same for the same picture"
    assert said_by("random:6", bundle, pictures[1:]).retained != said.retained


@pytest.mark.parametrize("name", ["skipped", "random:6", "pool:4"])
def test_pytorch_answers_alike(name: str, bundle: Path, pictures: list[Image.Image]) -> None:
    ours, theirs = (said_by(name, bundle, pictures, engine) for engine in (EngineName.ONNXRUNTIME, EngineName.TORCH))
    assert ours.text == theirs.text
    assert (ours.visual_tokens, ours.cached_rows, ours.flops) == (
        theirs.visual_tokens,
        theirs.cached_rows,
        theirs.flops,
    )


def test_everything_left_is_dense(bundle: Path, pictures: list[Image.Image]) -> None:
    dense, *others = (said_by(name, bundle, pictures) for name in ("dense", "random:16", "pool:16"))
    for said in others:
        assert (said.text, said.visual_tokens, said.cached_rows, said.flops) == (
            dense.text,
            dense.visual_tokens,
            dense.cached_rows,
            dense.flops,
        )


def test_what_each_takes(bundle: Path, manifest: Manifest, pictures: list[Image.Image]) -> None:
    found = {name: said_by(name, bundle, pictures[:1]) for name in names(manifest)}
    # 4 retained, 6 skipped and 2 summaries; of those 6 stay.
    assert [found[name].visual_tokens for name in names(manifest)] == [
        manifest.config.skip.num_skipped + 6 if manifest.config.skip else 0,
        16,
        6,
        4,
        0,
    ]
    text = found["blind"].cached_rows
    assert [found[name].cached_rows - text for name in names(manifest)] == [6, 16, 6, 4, 0]
    assert len(found["skipped"].retained[0]) == 4
    assert found["blind"].flops < found["pool:4"].flops < found["dense"].flops
    assert all(said.first_token > 0 for said in found.values())


def test_flops_are_those_of_the_prompt_and_of_each_token(
    bundle: Path, manifest: Manifest, pictures: list[Image.Image]
) -> None:
    asker = BundleAsker("skipped", bundle, manifest)
    question = Question(asker.processor, [Message("user", ASKED, images=1)], pictures[:1])
    cost = prompt_cost(manifest.config, question.prompt.layout)
    one, two = (asker.answer(ASKED, pictures[:1], count) for count in (1, 2))
    assert one.flops == cost.vision_flops + cost.prefill_flops
    assert two.flops == one.flops + cost.decode_flops
    asker.close()


def test_a_blind_answer_does_not_depend_on_the_picture(bundle: Path, pictures: list[Image.Image]) -> None:
    assert said_by("blind", bundle, pictures[:1]).text == said_by("blind", bundle, pictures[1:]).text


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("pool:5", "a square number of rows, such as 4"),
        ("random:0", "a picture has 16 visual tokens"),
        ("random:17", "a picture has 16 visual tokens"),
        ("random:x", "choose among skipped, dense, random, pool, blind"),
        ("44-69", "choose among skipped, dense, random, pool, blind"),
    ],
)
def test_an_asker_that_is_not_there(name: str, sentence: str, bundle: Path, manifest: Manifest) -> None:
    with pytest.raises(AskerError, match=sentence):
        BundleAsker(name, bundle, manifest)


def test_without_dense_graphs_there_are_no_baselines_but_blind(manifest: Manifest) -> None:
    alone = manifest.model_copy(update={"variant_table": {}})
    for name in ("dense", "random", "pool:4"):
        with pytest.raises(AskerError, match="`svcli export --variant dense` adds them"):
            full_name(name, alone)
    assert full_name("blind", alone) == "blind"


def test_a_plain_bundle_is_called_dense(checkpoint: Path, tmp_path: Path, pictures: list[Image.Image]) -> None:
    export_bundle(checkpoint, tmp_path / "plain", precision="fp32", max_context=96, skip="off")
    plain = load_manifest(tmp_path / "plain")
    assert own_name(plain) == "dense"
    for name, sentence in (("skipped", "choose among dense"), ("random", "say how many rows are left: random:N")):
        with pytest.raises(AskerError, match=sentence):
            full_name(name, plain)
    assert said_by("dense", tmp_path / "plain", pictures[:1]).visual_tokens == 16
    assert said_by("pool:4", tmp_path / "plain", pictures[:1]).visual_tokens == 4


@given(st.lists(st.integers(1, 5) | st.none(), min_size=1, max_size=6), st.integers(1, 4))
def test_picked_rows_stand_where_the_rows_of_pictures_do(parts: list[int | None], count: int) -> None:
    segments = tuple(ImageSpan(count) if part is None else part for part in parts)
    num_visual = count * parts.count(None)
    picked = tuple(np.random.default_rng(num_visual).permutation(10 * num_visual)[:num_visual].tolist())
    plain, chosen = TokenLayout(segments), TokenLayout(segments, picked=picked)
    table = np.arange(plain.num_ids + 10 * num_visual)
    rows = np.concatenate([table[: plain.num_ids], table[plain.num_ids :][list(picked)]])
    assert (table[chosen.source] == rows[plain.source]).all()
    assert (chosen.positions == plain.positions).all()


def test_rows_that_are_not_given_cannot_be_picked() -> None:
    layout = TokenLayout((2, ImageSpan(2)), picked=(0, 5))
    check_prefill(layout, Visual(np.zeros((1, 6, 8), np.float32)), 10)
    with pytest.raises(EngineError, match="pictures of 6 rows and 5 rows were given"):
        check_prefill(layout, Visual(np.zeros((1, 5, 8), np.float32)), 10)
    with pytest.raises(ValueError, match="1 rows are picked for 2 visual rows"):
        TokenLayout((2, ImageSpan(2)), picked=(0,))


def test_results_name_the_packages_of_every_engine() -> None:
    assert set(_MATTERS) == set(EngineName)

"""Pictures become profiles: of checkpoint and bundle alike, with any setting that fits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from skipvision.config import ConfigError, SkipConfig
from skipvision.profile import GROUPS, ProfileError
from svcli_export.agreement import drawn_cards
from svcli_export.bundle import export_bundle
from svcli_export.profiling import measure_pictures
from svcli_export.samples import SampleError
from svcli_export.source import read_source
from tests.export.tiny import SKIP, tiny_checkpoint

QUESTION = "what is this?"


def cards() -> list[Image.Image]:
    return drawn_cards()[:2]


def test_checkpoint_and_bundle_have_one_profile(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint")
    export_bundle(checkpoint, tmp_path / "bundle", precision="fp32", max_context=64, max_images=1)
    one, other = (
        measure_pictures(read_source(tmp_path / name), cards(), QUESTION) for name in ("checkpoint", "bundle")
    )
    assert (one.skip, one.is_trained) == (other.skip, other.is_trained) == (SKIP, True)
    assert len(one.profiles) == 2
    # fp32, and the error is a small difference of larger rows.
    np.testing.assert_allclose(one.spread.mean.error, other.spread.mean.error, rtol=1e-4)
    np.testing.assert_allclose(one.spread.mean.attention, other.spread.mean.attention, atol=1e-5)


def test_counts_change_the_split_and_nothing_else(tmp_path: Path) -> None:
    source = read_source(tiny_checkpoint(tmp_path / "checkpoint", SkipConfig(4, 6, "uniform", "all")))
    found = measure_pictures(source, cards()[:1], QUESTION, (3, 5))
    assert found.skip == SkipConfig(3, 5, "uniform", "all")
    assert not found.is_trained
    rows = dict(zip(GROUPS, found.profiles[0].rows, strict=True))
    assert (rows["retained"], rows["summary"], rows["skipped"]) == (3, 2, 5)
    assert measure_pictures(source, cards()[:1], QUESTION, (4, 6)).is_trained


def test_a_random_choice_is_the_same_every_time(tmp_path: Path) -> None:
    source = read_source(tiny_checkpoint(tmp_path / "checkpoint", replace(SKIP, selector="random")))
    one, other = (measure_pictures(source, cards()[:1], QUESTION).profiles[0] for _ in range(2))
    np.testing.assert_array_equal(one.error, other.error)


def test_progress_counts_pictures(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    source = read_source(tiny_checkpoint(tmp_path / "checkpoint"))
    measure_pictures(source, cards(), QUESTION, progress=lambda done, total: told.append((done, total)))
    assert told == [(0, 2), (1, 2), (2, 2)]


def test_a_plain_model_needs_counts_and_keeps_skipped_rows_in_sight(tmp_path: Path) -> None:
    source = read_source(tiny_checkpoint(tmp_path / "checkpoint", None))
    with pytest.raises(ProfileError, match="--skip"):
        measure_pictures(source, cards(), QUESTION)
    found = measure_pictures(source, cards()[:1], QUESTION, (4, 6))
    assert found.skip == SkipConfig(4, 6, visibility="all")
    assert not found.is_trained
    (profile,) = found.profiles
    assert profile.rows[GROUPS.index("skipped")] == 6


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    source = read_source(tiny_checkpoint(tmp_path / "checkpoint"))
    with pytest.raises(ConfigError, match="num_skipped"):
        measure_pictures(source, cards(), QUESTION, (4, 13))
    silent = replace(source, chat=source.chat.model_copy(update={"template": "no picture at all"}))
    with pytest.raises(SampleError, match="writes 0 placeholders for one picture, not 1"):
        measure_pictures(silent, cards(), QUESTION)

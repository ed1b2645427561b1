"""A conversation on a variant of a bundle: its own cache, its own answers, those of PyTorch."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from svcli.engines import EngineName, open_engine
from svcli.errors import UsageError
from svcli_engines.generate import Conversation, Piece, Stats
from svcli_engines.processor import Processor
from svcli_engines.sampling import Sampling
from svcli_export.manifest import Manifest, load_manifest


def answer(bundle: Path, manifest: Manifest, engine: EngineName, picture: Path) -> tuple[str, Stats]:
    runner = open_engine(engine, bundle, manifest)
    try:
        with Image.open(picture) as image:
            asked = [image.convert("RGB")]
        conversation = Conversation(runner, Processor(bundle, manifest))
        events = list(conversation.ask("What is this?", asked, sampling=Sampling(max_new_tokens=12)))
    finally:
        runner.close()
    stats = events[-1]
    assert isinstance(stats, Stats)
    return "".join(event.text for event in events if isinstance(event, Piece)), stats


def test_dense_and_skipped_are_run_from_one_bundle_as_pytorch_runs_them(bundle: Path, picture: Path) -> None:
    manifest = load_manifest(bundle)
    rows = []
    for each, visual in ((manifest, 6), (manifest.variant("dense"), 16)):
        said, stats = answer(bundle, each, EngineName.ONNXRUNTIME, picture)
        assert len(said) >= 12
        assert said == answer(bundle, each, EngineName.TORCH, picture)[0]
        assert (stats.visual_tokens_full, stats.visual_tokens_kept) == (16, visual)
        rows.append(stats.kv_rows)
    assert rows[1] - rows[0] == 16 - 6


@pytest.mark.parametrize("engine", [EngineName.TENSORRT, EngineName.TENSORRT_RTX])
def test_plans_are_not_of_a_variant(bundle: Path, engine: EngineName) -> None:
    with pytest.raises(UsageError, match="not of its variant dense; choose another engine"):
        open_engine(engine, bundle, load_manifest(bundle).variant("dense"))

"""The benchmark for a GPU, on the CPU with tiny models: everything but the clock and the sizes is what runs there."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from benchmarks import gpu_speed
from benchmarks.gpu_check import NO_DEVICE, Timer
from benchmarks.gpu_speed import (
    SETTINGS,
    STAGES,
    TEXT,
    VISION,
    Bench,
    Peer,
    Roofline,
    Setting,
    Variant,
    decode_step,
    joined,
    llama_weights,
    measured,
    prefill_step,
    roofline,
    variants,
)
from skipvision.config import TextConfig, VisionConfig
from skipvision.layout import BatchLayout
from tests.optional import missing

TINY_TEXT = TextConfig(50, 32, 48, 2, 4, 2, 8, tie_embeddings=False)
TINY_VISION = VisionConfig(28, 14, 16, 32, 2, 2, feature_layers=(1,), select_layer=1)
TINY = Setting(2, 56, 5, 7)


class WallClock:
    """What a CPU has."""

    def eager(self, run: Callable[[], object]) -> Timer:
        def seconds() -> float:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start

        return seconds

    def captured(self, run: Callable[[], None]) -> Timer:
        return self.eager(run)


@pytest.fixture(scope="module")
def made() -> dict[str, Variant]:
    torch.manual_seed(0)
    return variants(TINY_TEXT, TINY_VISION, TINY, "cpu")


def test_both_variants_have_the_same_weights_once_in_memory(made: dict[str, Variant]) -> None:
    dense, skipped = (made[name].model.state_dict() for name in ("dense", "skipped"))
    assert dense.keys() < skipped.keys()
    assert all(dense[name].data_ptr() == skipped[name].data_ptr() for name in dense)
    assert {each.dtype for each in dense.values()} == {torch.bfloat16}


def test_every_stage_is_timed_for_both(made: dict[str, Variant]) -> None:
    bench = Bench(made, None, 2, "cpu", WallClock(), compiled=False)
    found = measured(bench, 3, Roofline(1e9, 1e9))
    assert found["rows"] == {"dense": 8 + 2 * 16 + 32, "skipped": 8 + 2 * (5 + 7 + 2) + 32}
    # bf16 K and V of 2 layers, 2 heads of 8, for 2 sequences.
    assert found["kv_bytes"] == {"dense": 72 * 256, "skipped": 54 * 256}
    for stage in STAGES:
        assert set(found[stage]["seconds"]) == {"dense", "skipped"}
        assert found[stage]["seconds"]["dense"]["runs"] == 3
        assert found[stage]["times_roofline"]["dense"] > 0
    assert found["prefill"]["flops_ratio"] < 1
    assert found["vision"]["flops_ratio"] == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nto"), {"out_of_memory": "CUDA out of memory. Tried"}),
        (KeyError("what"), {"failed": "KeyError: 'what'"}),
    ],
)
def test_a_stage_that_fails_says_so_and_the_others_are_measured(
    made: dict[str, Variant], monkeypatch: pytest.MonkeyPatch, error: Exception, said: dict[str, str]
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(made["dense"].model, "fill", fail)
    found = measured(Bench(made, None, 1, "cpu", WallClock(), compiled=False), 1, Roofline(1e9, 1e9))
    assert found["prefill"] == found["decode_token"] == said
    assert found["vision"]["seconds"]["dense"]["runs"] == 1


def test_where_the_peer_does_not_fit_the_rest_is_measured_without_it(made: dict[str, Variant]) -> None:
    class Greedy:
        def prefill(self, _: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    peer = cast("Peer", Greedy())
    found = measured(Bench(made, peer, 1, "cpu", WallClock(), compiled=False), 1, Roofline(1e9, 1e9))
    assert set(found["prefill"]["seconds"]) == set(found["decode_token"]["seconds"]) == {"dense", "skipped"}


def test_a_prefill_step_is_prefill_every_time(made: dict[str, Variant], monkeypatch: pytest.MonkeyPatch) -> None:
    model, layout = made["skipped"].model, made["skipped"].layout
    batch = BatchLayout.of([layout], layout.num_ids)
    visual, ids = torch.randn(2, model.span.length, 32).bfloat16(), torch.arange(layout.num_ids)[None]
    expected, _ = model.prefill(ids, visual, batch, batch.num_kept)
    written: list[torch.Tensor] = []
    fill = model.fill

    def noted(*given: Any) -> torch.Tensor:
        written.append(fill(*given))
        return written[-1]

    monkeypatch.setattr(model, "fill", noted)
    step = prefill_step(model, ids, visual, batch)
    step()
    step()
    assert len(written) == 2
    assert all(torch.equal(each, expected) for each in written)


def test_runs_of_one_day_and_gpu_join_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    here: dict[str, Any] = {"date": "2030-01-01", "gpu": "a card", "versions": {"torch": "3"}, "transformers": None}
    first, other, again = (
        {"model": "llama-7b", "setting": "a", "batch": batch, "compiled": False, "vision": figure}
        for batch, figure in ((1, 1.0), (32, 2.0), (1, 3.0))
    )
    for cases in ([first], [other], [again]):
        path.write_text(json.dumps(joined(cases, here, path)))
    assert json.loads(path.read_text())["cases"] == [other, again]
    assert joined([first], here | {"gpu": "another"}, path)["cases"] == [first]
    path.write_text("{")
    assert joined([first], here, path)["cases"] == [first]


def test_a_decode_step_is_decode_at_the_same_place_every_time(made: dict[str, Variant]) -> None:
    model, layout = made["skipped"].model, made["skipped"].layout
    batch = BatchLayout.of([layout], layout.num_ids)
    visual = torch.randn(2, model.span.length, 32).bfloat16()
    ids = torch.arange(layout.num_ids)[None]
    _, cache = model.prefill(ids, visual, batch, batch.num_kept + 1)
    _, same = model.prefill(ids, visual, batch, batch.num_kept + 1)
    written: list[torch.Tensor] = []
    original = model.decoder.logits
    model.decoder.logits = lambda hidden: written.append(original(hidden)) or written[-1]  # type: ignore[method-assign,func-returns-value]
    try:
        step = decode_step(model, cache, ids[:, :1])
        step()
        step()
    finally:
        model.decoder.logits = original  # type: ignore[method-assign]
    expected = model.decode(ids[:, :1], same)
    assert all(torch.equal(each, expected) for each in written)
    assert int(cache.lengths) == batch.num_kept


def test_the_roofline_is_that_of_whichever_is_slower() -> None:
    limit = Roofline(flops_per_second=100, bytes_per_second=10)
    assert (limit.seconds(1000, 10), limit.seconds(10, 1000)) == (10, 100)


def test_rates_come_from_what_is_moved_and_multiplied() -> None:
    class Steady(WallClock):
        def eager(self, run: Callable[[], object]) -> Timer:
            run()
            return lambda: 0.5

    assert roofline(Steady(), "cpu", 2, copy_bytes=64, width=8) == Roofline(2 * 8**3 / 0.5, 2 * 64 / 0.5)


def test_settings_are_the_papers() -> None:
    """Sizes of the published models, without their memory: parameters on the meta device."""
    for setting in SETTINGS.values():
        patches = (setting.image_size // 14) ** 2
        assert setting.num_images * patches in (576, 1296, 2880)
    counts = {}
    for name, text in TEXT.items():
        made = variants(text, VISION, SETTINGS["LLaVA, 100 + 156 of 576"], "meta")
        counts[name] = round(sum(each.numel() for each in made["dense"].model.decoder.parameters()) / 1e9, 2)
    assert counts == {"llama-7b": 6.74, "llama-3-8b": 8.03}


def test_weights_get_the_names_of_transformers(made: dict[str, Variant]) -> None:
    names = [name for name, _ in llama_weights(made["dense"].model)]
    assert len(names) == len(set(names)) == 3 + 2 * 9
    assert "model.layers.1.self_attn.q_proj.weight" in names
    assert "model.layers.0.post_attention_layernorm.weight" in names


def test_the_peer_answers_as_the_dense_model(made: dict[str, Variant]) -> None:
    if find_spec("transformers") is None:
        missing("transformers")
    model, layout = made["dense"].model, made["dense"].layout
    peer = Peer(model, "cpu")
    visual, ids = torch.randn(2, 16, 32).bfloat16(), torch.arange(layout.num_ids)[None]
    batch = BatchLayout.of([layout], layout.num_ids)
    logits, cache = model.prefill(ids, visual, batch, batch.num_kept + 1)
    rows = model.embed(ids, visual, torch.from_numpy(batch.source))
    answer = peer.prefill(rows)
    torch.testing.assert_close(answer.logits[:, -1], logits, atol=0.05, rtol=0.05)
    token = torch.tensor([[3]])
    once, again = (peer.decode(token, answer.past_key_values) for _ in range(2))
    assert torch.equal(once, again)
    torch.testing.assert_close(once, model.decode(token, cache), atol=0.05, rtol=0.05)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_speed"])
    with pytest.raises(SystemExit) as ended:
        gpu_speed.main()
    assert ended.value.code == NO_DEVICE
    assert "no CUDA device" in capsys.readouterr().err

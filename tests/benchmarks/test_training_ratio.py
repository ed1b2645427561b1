"""The training-time benchmark with tiny decoders: what is compared is comparable, and FLOPs are those of the paper."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import training_ratio
from benchmarks.training_ratio import (
    ANSWER_ROWS,
    PROMPT_ROWS,
    SETTINGS,
    TRUE,
    WORK,
    Examples,
    add,
    flops_ratio,
    measure,
    plain_config,
    scaled,
    step_flops,
    variants,
)
from skipvision.config import TextConfig
from skipvision.cost import decoder_flops
from skipvision.layout import ImageSpan, TokenLayout
from skipvision.presets import PRESETS, Setting

TINY = TextConfig(50, 32, 48, 2, 4, 2, 8)
SMALL = PRESETS["sv-llava-100"]


def visual_ratio(text: TextConfig, setting: Setting, text_rows: int) -> float:
    """Of the decoder alone."""
    plain, skipped = (
        decoder_flops(text, TokenLayout((span, text_rows), "all")) for span in (setting.plain, setting.skipped)
    )
    return skipped / plain


@pytest.mark.parametrize(
    ("name", "percent"), [("sv-llava-100", 22.9), ("sv-llava-256", 56.4), ("sv-cos-272", 24.6), ("sv-llava-hd", 23.1)]
)
def test_the_true_shape_saves_what_was_computed_for_it(name: str, percent: float) -> None:
    # Those figures leave out the two summary rows of each picture.
    assert 100 * visual_ratio(TRUE, PRESETS[name], 0) == pytest.approx(percent, abs=0.35)
    assert visual_ratio(TRUE, PRESETS[name], 100) > visual_ratio(TRUE, PRESETS[name], 0)


@pytest.mark.parametrize("divisor", [2, 4, 8])
def test_a_scaled_decoder_keeps_the_share_of_the_ffn(divisor: int) -> None:
    def share(text: TextConfig) -> float:
        ffn = 6 * text.hidden_size * text.intermediate_size
        return ffn / (ffn + 4 * text.hidden_size * text.head_dim * (text.num_heads + text.num_kv_heads))

    text = scaled(TRUE, divisor, 2)
    assert share(text) == share(TRUE) == pytest.approx(0.808, abs=5e-4)
    assert text.head_dim == TRUE.head_dim


def test_narrower_layers_make_long_sequences_cheaper_to_skip_in() -> None:
    """Attention, which shrinks with the square of the rows, weighs more there: that is why both ratios are told."""
    narrow = scaled(TRUE, 4, TRUE.num_layers)
    setting = PRESETS["sv-llava-hd"]
    plain, skipped = (decoder_flops(narrow, TokenLayout((span,))) for span in (setting.plain, setting.skipped))
    assert skipped / plain < visual_ratio(TRUE, setting, 0)


def test_a_step_counts_three_forward_passes_the_head_and_the_merge() -> None:
    plain = decoder_flops(TINY, TokenLayout((PROMPT_ROWS + ANSWER_ROWS, SMALL.plain)))
    assert step_flops(TINY, SMALL, skips=False) == 3 * (plain + ANSWER_ROWS * 2 * 32 * 50)
    merge = 2 * 32 * 476**2 + 2 * 32 * 156 * 320 + 4 * 32 * 256
    skipped = decoder_flops(TINY, TokenLayout((PROMPT_ROWS + ANSWER_ROWS, ImageSpan(100, 156, 2))))
    assert step_flops(TINY, SMALL, skips=True) == 3 * (skipped + ANSWER_ROWS * 2 * 32 * 50 + merge)
    assert flops_ratio(TINY, SMALL)["ratio"] < 1


@pytest.mark.parametrize("name", SETTINGS)
def test_the_rows_of_a_setting_are_the_papers(name: str) -> None:
    setting = PRESETS[name]
    runs = variants(setting, TINY, 1, "cpu")
    text = PROMPT_ROWS + ANSWER_ROWS
    assert runs["causal"].layout.length == runs["masked"].layout.length == setting.num_tokens + text
    for kind in ("all", "image"):
        assert runs[kind].layout.length == setting.num_retained + setting.num_skipped + 2 + text
        assert runs[kind].layout.num_skipped == setting.num_skipped
        assert runs[kind].batch.num_kept == setting.num_retained + 2 + text
    examples = Examples.drawn(setting, TINY, 1, "cpu", torch.float32)
    with torch.no_grad():
        visual = runs["all"].model.split(examples.tokens, examples.attention)
    assert visual.shape == (1, setting.skipped.length, 32)


def test_plain_with_a_mask_and_without_is_one_model_and_both_models_begin_alike() -> None:
    runs = variants(SMALL, TINY, 2, "cpu")
    examples = Examples.drawn(SMALL, TINY, 2, "cpu", torch.float32)
    losses = {name: run.loss(examples)[0].item() for name, run in runs.items()}
    assert losses["causal"] == pytest.approx(losses["masked"], rel=1e-6)
    assert len({round(loss, 5) for name, loss in losses.items() if name != "causal"}) == 3
    plain, skipping = runs["causal"].model.state_dict(), runs["all"].model.state_dict()
    assert all(torch.equal(tensor, skipping[name]) for name, tensor in plain.items())


@pytest.mark.parametrize("name", ["causal", "all", "image"])
def test_a_step_learns_and_what_it_reports_adds_up(name: str) -> None:
    run = variants(SMALL, TINY, 2, "cpu")[name]
    examples = Examples.drawn(SMALL, TINY, 2, "cpu", torch.float32)
    before = {key: tensor.clone() for key, tensor in run.model.decoder.state_dict().items()}
    found = run.step(examples)
    assert found["step"] == pytest.approx(found["forward"] + found["backward"] + found["optimiser"])
    assert 0 <= found["split"] < found["forward"]
    assert all(not torch.equal(tensor, before[key]) for key, tensor in run.model.decoder.state_dict().items())
    run.loss(examples)[0].backward()  # type: ignore[no-untyped-call]
    assert examples.tokens.grad is not None
    # Every visual token reaches the loss: retained as it is, the others through the merge.
    assert bool((examples.tokens.grad.abs().sum(-1) > 0).all())
    assert run.model.summary is None or run.model.summary.score.weight.grad is not None


def test_what_is_kept_for_the_backward_pass_grows_with_the_batch_and_shrinks_with_skipping() -> None:
    text = replace(TINY, hidden_size=128, intermediate_size=448)  # so wide that masks and matches do not count

    def kept(name: str, batch_size: int) -> int:
        examples = Examples.drawn(SMALL, text, batch_size, "cpu", torch.float32)
        return variants(SMALL, text, batch_size, "cpu")[name].saved_bytes(examples)

    # A layer keeps at least the FFN's gate, up and their product for each row that passes it.
    least = 2 * 3 * 448 * 4 * (SMALL.num_tokens + PROMPT_ROWS + ANSWER_ROWS)
    assert least < kept("causal", 1) < 10 * least
    assert kept("causal", 2) == pytest.approx(2 * kept("causal", 1), rel=0.05)
    assert kept("all", 2) < 0.7 * kept("causal", 2)


def test_a_measurement_says_all_that_the_documents_show() -> None:
    setting = replace(SMALL, num_retained=10, num_skipped=20)
    found = measure(setting, TINY, 1, 2, "cpu")
    for stage in ("step", "forward", "backward", "optimiser"):
        assert found[stage]["dense"]["runs"] == found[stage]["skipped"]["runs"] == 2
    assert found["baseline"] in ("causal", "masked")
    assert set(found["others"]) == {"causal", "masked", "image"} - {found["baseline"]}
    assert found["rows"] == {"dense": 676, "skipped": 132}
    for kind in ("dense", "skipped"):
        assert set(found["work"][kind]) == set(WORK)
        assert all(seconds > 0 for seconds in found["work"][kind].values())
    fall = found["fall"]
    assert fall["flops"] == 1 - found["flops"]["measured"]["ratio"]
    assert fall["quotient"] == pytest.approx((1 - found["step"]["ratio"]["ratio"]) / fall["flops"])
    assert found["saved_bytes"]["ratio"] < 0.5


def test_settings_join_those_that_were_measured_before(tmp_path: Path) -> None:
    path = tmp_path / "ratio.json"
    add("sv-cos-272", {"date": "a"}, path)
    add("sv-llava-100", {"date": "b"}, path)
    add("sv-cos-272", {"date": "c"}, path)
    found = json.loads(path.read_text(encoding="utf-8"))
    assert list(found.items()) == [("sv-llava-100", {"date": "b"}), ("sv-cos-272", {"date": "c"})]


def test_the_script_writes_and_says_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training_ratio, "TRUE", replace(TINY, head_dim=4))
    arguments = ["--settings", "sv-llava-256", "--divisor", "2", "--batch-size", "1", "--layers", "1", "--steps", "1"]
    path = tmp_path / "ratio.json"
    monkeypatch.setattr(sys, "argv", ["training_ratio", *arguments, "--threads", "1", "-o", str(path)])
    training_ratio.main()
    found = json.loads(path.read_text(encoding="utf-8"))["sv-llava-256"]
    assert found["decoder"]["hidden_size"] == 16
    assert found["threads"] == 1
    assert f"FLOPs ratio {found['flops']['measured']['ratio']:.3f}" in capsys.readouterr().out


def test_tokens_are_those_of_the_setting() -> None:
    for name in SETTINGS:
        config = plain_config(PRESETS[name], TINY)
        skip = PRESETS[name].skip_config(config)
        assert (skip.num_retained, skip.num_skipped) == (PRESETS[name].num_retained, PRESETS[name].num_skipped)
        assert skip.visibility == "all"

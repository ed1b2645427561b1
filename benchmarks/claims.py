"""What the paper claims, and what our own figures say of it: each verdict is a rule over results. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import mean
from typing import Any, Literal

from benchmarks.blocks import NotMeasuredError, result, seconds, table
from benchmarks.main_blocks import shares, with_spread
from skipvision.estimate import Side, estimate
from skipvision.known_models import KNOWN_MODELS
from skipvision.presets import PRESETS, Printed

Verdict = Literal["holds here", "holds in part", "does not hold here", "not measured"]
SETTINGS = ("sv-llava-100", "sv-llava-256", "sv-llava-hd", "sv-cos-272")
"""Those that the paper prints costs of."""
NEAR = 0.9
"""A share of the printed saving that still counts as the saving."""
POINT = 0.01
"""Of accuracy, that still counts as kept: the paper's SV-LLaVA 100/156 has 0.7 points less than LLaVA on average."""
LEAST_TRAINING, LEAST_LATENCY = 0.22, 0.18
"""The smallest savings that are claimed."""
_HOST = "llava-llama-3-8b"
"""The model that the paper's costs are of."""


@dataclass(frozen=True)
class Finding:
    """Our side of a claim."""

    figures: str
    verdict: Verdict


@dataclass(frozen=True)
class Claim:
    """One statement of the paper."""

    says: str
    place: str
    """Where in the paper, or in the authors' other texts."""
    find: Callable[[], Finding]
    """Raises NotMeasuredError."""

    def finding(self) -> Finding:
        try:
            return self.find()
        except NotMeasuredError as error:
            return Finding(str(error), "not measured")


def claims_table() -> str:
    """Every claim with our figures."""
    rows = []
    for claim in CLAIMS:
        found = claim.finding()
        rows.append([f"{claim.says} ({claim.place})", f"**{found.verdict}**", found.figures])
    return table(["the paper", "verdict", "our figures"], rows, texts=3)


def verdict_of(met: list[bool]) -> Verdict:
    """Of the cases of one claim."""
    return "holds here" if all(met) else "holds in part" if any(met) else "does not hold here"


def _fall(ratio: float) -> str:
    """How far something falls, or grows, in percent."""
    return f"{'-' if ratio < 1 else '+'}{abs(1 - ratio):.0%}".replace("%", " %")


def _listed(cases: dict[str, str]) -> str:
    return "; ".join(f"{name} {case}" for name, case in cases.items())


def _printed(name: str, what: Literal["flops", "hours", "latency"]) -> float:
    printed: Printed = PRESETS[name].printed
    share = getattr(printed, what)
    assert isinstance(share, float)
    return share


def _inference_flops() -> Finding:
    """Counted, not timed: of one picture's rows in all layers."""
    host = KNOWN_MODELS[_HOST].config
    ratios = {}
    for name in SETTINGS:
        found = estimate(host, PRESETS[name], 0)
        ratios[name] = found.skipped.visual_flops / found.dense.visual_flops
    met = [1 - ratios[name] >= NEAR * (1 - _printed(name, "flops")) for name in SETTINGS]
    told = {name: f"{_fall(ratio)} (printed {_fall(_printed(name, 'flops'))})" for name, ratio in ratios.items()}
    return Finding(f"Counted for LLaMA-3-8B, a picture's rows alone: {_listed(told)}", verdict_of(met))


def _training_time() -> Finding:
    """Of the decoder, where skipping saves, at the paper's settings; and of the bundled model's recipe with and without
    its encoder, which skips nothing.
    """
    steps = {name: result("training_ratio")[name]["step"]["ratio"] for name in SETTINGS}
    told = {name: f"{_fall(each['ratio'])} (printed {_fall(_printed(name, 'hours'))})" for name, each in steps.items()}
    found = result("training_time")
    step, dense = found["step"]["ratio"], found["step"]["dense"]["median"]
    encoding = found["recipe"]["batch_size"] / found["encoding"]["pictures_per_second"]
    with_encoder = {each: (dense * step[each] + encoding) / (dense + encoding) for each in ("ratio", "low", "high")}
    met = [1 - each["high"] >= LEAST_TRAINING for each in (*steps.values(), step, with_encoder)]
    return Finding(
        f"A step of the decoder alone, two layers of LLaMA-3-8B's shape at a quarter of its width, on a CPU:"
        f" {_listed(told)}. A step of the bundled model's recipe: {_between(step)}; where it encodes its pictures as"
        f" well: {_between(with_encoder)}",
        verdict_of(met),
    )


def _between(found: Mapping[str, float]) -> str:
    return f"{_fall(found['ratio'])} ({_fall(found['low'])} to {_fall(found['high'])})"


def _latency() -> Finding:
    """From pixels to the first token, which is the larger part of a short answer."""
    found = result("speed")
    first, prefill = (found["onnxruntime"][stage]["ratio"] for stage in ("first_token", "prefill"))
    whole = found["chat"]["seconds"]["ratio"]
    vision = found["onnxruntime"]["vision"]["skipped"]["median"]
    total = found["onnxruntime"]["first_token"]["skipped"]["median"]
    return Finding(
        f"The bundled model on a CPU: prefill {_fall(prefill['ratio'])}, pixels to first token"
        f" {_fall(first['ratio'])}, a whole chat {_fall(whole['ratio'])}. Its encoder, which skips nothing, takes"
        f" {seconds(vision)} of {seconds(total)}. No GPU and no 8B model was timed",
        "holds here" if 1 - first["high"] >= LEAST_LATENCY else "does not hold here",
    )


def _cache() -> Finding:
    host = KNOWN_MODELS[_HOST].config
    counted: dict[str, str] = {}
    for name in SETTINGS:
        found = estimate(host, PRESETS[name], 0)
        counted[name] = _fall(_kept(found.skipped) / _kept(found.dense))
    real = result("speed")["kv_cache"]
    ratio = real["skipped"]["bytes"] / real["dense"]["bytes"]
    return Finding(
        f"The bundled model's cache behind an answer: {_fall(ratio)}, text included. Counted for a picture on"
        f" LLaMA-3-8B: {_listed(counted)}",
        "holds here" if ratio < 1 else "does not hold here",
    )


def _kept(side: Side) -> int:
    return side.picture_kv_bytes


def _decode() -> Finding:
    ratio = result("speed")["onnxruntime"]["decode_token"]["ratio"]
    return Finding(
        f"One token of one conversation, bundled model on a CPU: {_between(ratio)}. Large models read weights more"
        " than cache there, so expect less",
        "holds here" if ratio["high"] < 1 else "does not hold here",
    )


def _rows() -> dict[str, Any]:
    rows: dict[str, Any] = result("main_table")["variants"]
    return rows


def _right(row: Any) -> list[float]:
    return shares(row, "all")


def _beside(names: dict[str, str]) -> str:
    rows = _rows()
    return _listed({title: f"{with_spread(_right(rows[name]))} %" for name, title in names.items()})


def _by_seed(name: str, other: str) -> str:
    """Differences in points; with a seed both were trained on the same batches, from the same base."""
    rows = _rows()
    pairs = zip(_right(rows[name]), _right(rows[other]), strict=True)
    return ", ".join(f"{100 * (mine - theirs):+.1f}" for mine, theirs in pairs)


def not_below(row: Any, other: Any) -> bool:
    """Whether the mean over seeds is lower by a point at most."""
    return mean(_right(row)) >= mean(_right(other)) - POINT


def above(row: Any, other: Any) -> bool:
    """Whether the mean over seeds is higher by more than a point."""
    return mean(_right(row)) > mean(_right(other)) + POINT


def _accuracy() -> Finding:
    """Of the settings that retain as large a share as the paper's do; the smallest of ours retains half of that."""
    rows, names = _rows(), {"skip-large": "96/64", "skip-middle": "44/69"}
    met = [not_below(rows[name], rows["dense"]) for name in names]
    beyond = {"skip-small": "24/40, a smaller share than the paper retains, and not judged,"}
    seeds = _listed({title: _by_seed(name, "dense") for name, title in names.items()})
    return Finding(
        f"Right answers: {_beside({'dense': 'dense'} | names | beyond)}. Above dense, seed by seed: {seeds} points",
        verdict_of(met),
    )


def _skip_kv() -> Finding:
    """Where later text may see skipped rows, as the paper trains: else nothing reads them, and nothing can change."""
    rows = _rows()
    titles = {"seen-by-all": "44/69 with skipped rows seen by all", "seen-by-all-kept": "the same without Skip-KV"}
    return Finding(
        f"{_beside(titles)}. The first above the other, seed by seed: {_by_seed(*titles)} points",
        verdict_of([not_below(rows["seen-by-all"], rows["seen-by-all-kept"])]),
    )


def _rivals() -> Finding:
    """With about as many rows in the cache, but for FastV, whose first layers keep all."""
    rows = _rows()
    rivals = {
        "zip": "VisionZip-like untrained",
        "fastv": "FastV-like untrained",
        "zip-trained": "VisionZip-like trained",
        "pooled": "pooling trained",
        "random-drop": "random drop trained",
    }
    met = [above(rows["skip-middle"], rows[name]) for name in rivals]
    titles = {"skip-middle": "44/69"} | rivals
    with_rows = {name: f"{title}, {rows[name]['cache_rows']:.3g} rows," for name, title in titles.items()}
    return Finding(f"Rows in the cache, as means over layers: {_beside(with_rows)}", verdict_of(met))


def _worth_of_skipped() -> Finding:
    rows = _rows()
    return Finding(
        _beside({"skip-middle": "44/69", "no-summary": "the 44 retained alone"}),
        verdict_of([above(rows["skip-middle"], rows["no-summary"])]),
    )


def _merging() -> Finding:
    rows = _rows()
    titles = {"skip-middle": "44/69", "no-merge": "44/212, without merging"}
    return Finding(
        f"{_beside(titles)}. The first above the other, seed by seed: {_by_seed(*titles)} points",
        verdict_of([not_below(rows["skip-middle"], rows["no-merge"])]),
    )


def _selection() -> Finding:
    rows = _rows()
    return Finding(
        _beside({"skip-middle": "by the CLS token's attention", "random": "at random"}),
        verdict_of([above(rows["skip-middle"], rows["random"])]),
    )


CLAIMS = (
    Claim("Inference takes 75, 40, 50 and 75 % fewer FLOPs", "table 1", _inference_flops),
    Claim("Training takes 22 to 40 % less time", "table 1, project page", _training_time),
    Claim("Latency falls by 18 to 45 %", "abstract, table 1", _latency),
    Claim("Skipped rows leave the KV cache", "method", _cache),
    Claim("Decoding is quicker with the smaller cache", "Skip-KV ablation", _decode),
    Claim("Accuracy is kept", "tables 1 and 2", _accuracy),
    Claim("Skip-KV costs no accuracy", "Skip-KV ablation", _skip_kv),
    Claim("Better than other ways to as few rows", "table 2", _rivals),
    Claim("Tokens that skip the FFN are worth more than tokens that are dropped", "method", _worth_of_skipped),
    Claim("Skipped tokens may be merged first", "method", _merging),
    Claim("Attention of the CLS token finds what to retain", "method", _selection),
)

"""A profile is what plain loops find, and its bounds hold."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skipvision.bound import WeightNorms, attention_constant, ffn_constant, next_bound, row_rms, spectral_norm
from skipvision.config import SkipConfig, TextConfig, Visibility
from skipvision.decoder import DecoderLayer
from skipvision.layout import TokenLayout
from skipvision.model import SkipVisionModel
from skipvision.profile import ASKERS, GROUPS, Profile, ProfileError, Sample, Spread, measure
from tests.skipvision import reference
from tests.skipvision.reference import Array, Row, Weights
from tests.skipvision.tiny import IMAGE, PROMPTS, SKIPS, TOLERANCE, VOCAB, Batch, batch_of, tiny_config, tiny_model

# The figures are sums and ratios of values around 1 that are as good as those of `TOLERANCE`.
CLOSE = 10 * TOLERANCE[torch.float64]
BEHIND = {name: ids for name, ids in PROMPTS.items() if IMAGE in ids and ids[-1] != IMAGE}
SKIPPING = {name: skip for name, skip in SKIPS.items() if skip is not None}


def profiled(model: SkipVisionModel, made: Batch, ids: list[int]) -> Profile:
    (found,) = measure(model, [Sample(ids, made.visual, made.layouts[0])])
    return found


def run(
    weights: Weights, config: TextConfig, rows: list[Row], visibility: str, *, skip: bool
) -> list[dict[str, Array]]:
    """Every layer's rows before it, behind attention and behind it, what both parts add, and the softmax [H, L, L].

    One row and one head at a time, in attention order; with `skip` rows that are skipped do not pass the FFN.
    """
    hidden, layers = [row.vector for row in rows], []
    size, shared = config.head_dim, config.num_heads // config.num_kv_heads
    for layer in range(config.num_layers):
        name, eps = f"decoder.layers.{layer}", config.rms_norm_eps
        normed = [reference.rms_norm(row, weights[f"{name}.norm1.weight"], eps) for row in hidden]
        heads = {
            part: [reference.linear(weights, f"{name}.attention.{part}", row).reshape(-1, size) for row in normed]
            for part in "qkv"
        }
        for part in "qk":
            heads[part] = [
                np.array([reference.rotate(head, place, config.rope_theta) for head in row])
                for place, row in enumerate(heads[part])
            ]
        softmax = np.zeros((config.num_heads, len(rows), len(rows)))
        attended = []
        for place in range(len(rows)):
            visible = [
                key
                for key in range(place + 1)
                if visibility == "all" or rows[key].kind != "skipped" or rows[key].image == rows[place].image
            ]
            mixed = []
            for head in range(config.num_heads):
                scores = [
                    float(heads["q"][place][head] @ heads["k"][key][head // shared]) / math.sqrt(size)
                    for key in visible
                ]
                softmax[head, place, visible] = reference.softmax(scores)
                mixed.append(
                    sum(softmax[head, place, key] * heads["v"][key][head // shared] for key in range(place + 1))
                )
            attended.append(reference.linear(weights, f"{name}.attention.o", np.concatenate(mixed)))
        behind = [row + more for row, more in zip(hidden, attended, strict=True)]
        added = [
            reference.swiglu(
                weights, f"{name}.ffn", reference.rms_norm(row, weights[f"{name}.norm2.weight"], config.rms_norm_eps)
            )
            for row in behind
        ]
        out = [
            row if skip and each.kind == "skipped" else row + more
            for each, row, more in zip(rows, behind, added, strict=True)
        ]
        layers.append(
            {
                "before": np.array(hidden),
                "attended": np.array(attended),
                "behind": np.array(behind),
                "added": np.array(added),
                "out": np.array(out),
                "softmax": softmax,
                **{part: np.array(heads[part]) for part in "qkv"},
            }
        )
        hidden = out
    return layers


def constants(
    weights: Weights, config: TextConfig, layer: int, one: dict[str, Array], other: dict[str, Array], kept: Array
) -> tuple[float, float]:
    """a and f of a layer, as `bound.py` states them, between its full and its skipping run."""

    def norm(matrix: Array) -> float:
        return float(np.linalg.svd(matrix)[1][0])

    def rms(row: Array) -> float:
        return math.sqrt(float((row**2).mean()) + config.rms_norm_eps)

    def scaled(name: str, scale: str) -> Array:
        return weights[f"decoder.layers.{layer}.{name}.weight"] * weights[f"decoder.layers.{layer}.{scale}.weight"]

    size, shared = config.head_dim, config.num_heads // config.num_kv_heads
    heads = []
    for head in range(config.num_heads):
        theirs = head // shared
        query, key, value = (
            norm(scaled(f"attention.{part}", "norm1")[size * number : size * (number + 1)])
            for part, number in (("q", head), ("k", theirs), ("v", theirs))
        )
        keys, values = (one[part][:, theirs] - one[part][:, theirs].mean(0) for part in "kv")
        scores = (query * norm(keys) + norm(other["q"][:, head]) * key) / math.sqrt(size)
        heads.append(math.sqrt(other["softmax"][head].sum(0).max()) * value + 0.5 * scores * norm(values))
    least = min(rms(row) for each in (one, other) for row in each["before"])
    attention = norm(weights[f"decoder.layers.{layer}.attention.o.weight"]) * math.hypot(*heads) / least
    gate, up = scaled("ffn.gate", "norm2"), scaled("ffn.up", "norm2")
    ffn = max(
        (
            1.1 * np.abs(up @ row / rms(row)).max() * norm(gate)
            + np.abs(reference.silu(gate @ twin / rms(twin))).max() * norm(up)
        )
        / min(rms(row), rms(twin))
        for row, twin in zip(one["behind"][kept], other["behind"][kept], strict=True)
    )
    return attention, float(ffn * norm(weights[f"decoder.layers.{layer}.ffn.down.weight"]))


def plainly(model: SkipVisionModel, rows: list[Row]) -> dict[str, list[object]]:
    """What `measure` should find, by names of Profile."""
    weights, config = reference.weights_of(model), model.config
    visibility = "image" if config.skip is None else config.skip.visibility
    full, skipping = (run(weights, config.text, rows, visibility, skip=skip) for skip in (False, True))
    kinds = np.array([row.kind for row in rows])
    kept, pictures = kinds != "skipped", [place for place, row in enumerate(rows) if row.image is not None]
    ends = [place for place in pictures if place + 1 == len(rows) or rows[place + 1].image != rows[place].image]
    askers = {"text": list(range(pictures[-1] + 1, len(rows))), "summary": ends}
    found: dict[str, list[object]] = defaultdict(list)
    bound = proven = 0.0
    for layer, (one, other) in enumerate(zip(full, skipping, strict=True)):
        for name, part, base in (("ffn_update", "added", "behind"), ("attention_update", "attended", "before")):
            ratios = [np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(one[part], one[base], strict=True)]
            found[name].append(
                [
                    [np.mean(own), np.median(own), np.quantile(own, 0.9)] if own else [np.nan] * 3
                    for group in GROUPS
                    for own in [[ratio for ratio, kind in zip(ratios, kinds, strict=True) if kind == group]]
                ]
            )
        found["attention"].append(
            [
                [
                    np.mean([other["softmax"][:, place, kinds == group].sum(-1) for place in askers[asker]])
                    if group in kinds
                    else np.nan
                    for group in GROUPS
                ]
                for asker in ASKERS
            ]
        )
        changed, moved = (float(np.linalg.norm(one[part] - other[part])) for part in ("before", "behind"))
        attention_gain = np.linalg.norm(one["attended"] - other["attended"]) / changed if changed else np.nan
        ffn_gain = np.linalg.norm((one["added"] - other["added"])[kept]) / moved if moved else np.nan
        injected = float(np.linalg.norm(one["added"][~kept]))
        bound = injected if bound == 0 else bound * (1 + attention_gain) * (1 + ffn_gain) + injected
        attention, ffn = constants(weights, config.text, layer, one, other, kept)
        proven = injected if proven == 0 else proven * (1 + attention) * (1 + ffn) + injected
        difference = one["out"] - other["out"]
        error, error_kept = float(np.linalg.norm(difference)), float(np.linalg.norm(difference[kept]))
        size, size_kept = float(np.linalg.norm(one["out"])), float(np.linalg.norm(one["out"][kept]))
        for name, value in {
            "attention_gain": attention_gain,
            "ffn_gain": ffn_gain,
            "injected": injected,
            "bound_gains": bound,
            "attention_constant": attention,
            "ffn_constant": ffn,
            "bound": proven,
            "relative_bound": proven / size,
            "error": error,
            "error_kept": error_kept,
            "size": size,
            "size_kept": size_kept,
            "relative_error": error / size,
            "relative_error_kept": error_kept / size_kept,
            "relative_bound_gains": bound / size,
        }.items():
            found[name].append(value)
    shares = [
        reference.softmax(
            reference.linear(
                weights,
                "decoder.head",
                reference.rms_norm(layers[-1]["out"][-1], weights["decoder.norm.weight"], config.text.rms_norm_eps),
            )
        )
        for layers in (full, skipping)
    ]
    found["kl"] = [float((shares[0] * np.log(shares[0] / shares[1])).sum())]
    found["same_token"] = [float(shares[0].argmax() == shares[1].argmax())]
    return found


@pytest.mark.parametrize("ids", BEHIND.values(), ids=BEHIND.keys())
@pytest.mark.parametrize("skip", SKIPPING.values(), ids=SKIPPING.keys())
def test_every_figure_is_what_plain_loops_find(skip: SkipConfig, ids: list[int]) -> None:
    model = tiny_model(tiny_config(skip))
    made = batch_of(model, [ids])
    found, expected = profiled(model, made, ids), plainly(model, made.rows[0])
    assert expected.keys() == {field.name for field in fields(Profile)} - {"rows"}
    for name, values in expected.items():
        ours = np.atleast_1d(getattr(found, name))
        np.testing.assert_allclose(ours, np.array(values), rtol=CLOSE, atol=CLOSE, err_msg=name)
    kinds = [row.kind for row in made.rows[0]]
    assert found.rows.tolist() == [kinds.count(group) for group in GROUPS]


@pytest.mark.parametrize("skip", SKIPPING.values(), ids=SKIPPING.keys())
def test_the_skipping_run_is_the_model(skip: SkipConfig) -> None:
    """What is measured ends in the logits that the model gives: KL from the plain run is that to them."""
    ids = PROMPTS["image-between"]
    model = tiny_model(tiny_config(skip))
    made = batch_of(model, [ids])
    found = profiled(model, made, ids)
    with torch.no_grad():
        theirs = model(made.input_ids, made.visual, made.batch)[0, -1].log_softmax(-1).numpy()
    full = run(reference.weights_of(model), model.config.text, made.rows[0], skip.visibility, skip=False)[-1]["out"][-1]
    with torch.no_grad():
        plain = model.decoder.logits(torch.from_numpy(full)).log_softmax(-1).numpy()
    assert found.kl == pytest.approx(float((np.exp(plain) * (plain - theirs)).sum()), abs=CLOSE)


@pytest.mark.parametrize("skip", SKIPPING.values(), ids=SKIPPING.keys())
def test_attention_that_is_paid_sums_to_one(skip: SkipConfig) -> None:
    model = tiny_model(tiny_config(skip))
    for ids in BEHIND.values():
        found = profiled(model, batch_of(model, [ids]), ids)
        np.testing.assert_allclose(np.nansum(found.attention, -1), 1, rtol=1e-12)


def test_text_pays_skipped_rows_nothing_where_it_does_not_see_them() -> None:
    ids, skipped = PROMPTS["image-first"], GROUPS.index("skipped")
    visibilities: tuple[Visibility, ...] = ("image", "all")
    hidden, seen = (
        profiled(model, batch_of(model, [ids]), ids).attention
        for visibility in visibilities
        for model in [tiny_model(tiny_config(SkipConfig(5, 4, visibility=visibility)))]
    )
    assert (hidden[:, ASKERS.index("text"), skipped] == 0).all()
    assert (hidden[:, ASKERS.index("summary"), skipped] > 0).all()
    assert (seen[..., skipped] > 0).all()


@pytest.mark.parametrize("skip", [SkipConfig(5, 0), SkipConfig(16, 0)], ids=str)
def test_where_nothing_is_skipped_nothing_is_off(skip: SkipConfig) -> None:
    model, ids = tiny_model(tiny_config(skip)), PROMPTS["image-between"]
    found = profiled(model, batch_of(model, [ids]), ids)
    for name in ("error", "error_kept", "injected", "bound_gains", "bound", "relative_error", "relative_bound"):
        assert getattr(found, name).tolist() == [0, 0]
    assert (found.kl, found.same_token) == (0, 1)
    assert np.isnan(found.attention_gain).all()
    assert np.isnan(found.ffn_update[:, GROUPS.index("skipped")]).all()
    assert np.isnan(found.attention[:, :, GROUPS.index("skipped")]).all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([0.05, 0.5, 1.0, 4.0]),
    retained=st.integers(1, 8),
    skipped=st.integers(1, 8),
    visibility=st.sampled_from(["image", "all"]),
    before=st.lists(st.integers(2, VOCAB - 1), max_size=3),
    behind=st.lists(st.integers(2, VOCAB - 1), min_size=1, max_size=4),
)
def test_the_bounds_hold(
    seed: int, scale: float, retained: int, skipped: int, visibility: Visibility, before: list[int], behind: list[int]
) -> None:
    model = tiny_model(tiny_config(SkipConfig(retained, skipped, visibility=visibility)), seed=seed)
    with torch.no_grad():
        for parameter in model.decoder.layers.parameters():
            parameter.mul_(scale)
    ids = [*before, IMAGE, *behind]
    found = profiled(model, batch_of(model, [ids]), ids)
    room = 1 + 1e-9  # rounding in fp64
    assert (found.error > 0).all()
    assert (found.error_kept <= found.error).all()
    assert (found.error <= found.bound_gains * room).all()
    assert (found.bound_gains <= found.bound * room).all()
    # Nothing differed before the first layer, so that its attention has no gain.
    assert (found.attention_gain[1:] <= found.attention_constant[1:]).all()
    assert (found.ffn_gain[1:] <= found.ffn_constant[1:]).all()


def test_the_bound_is_the_sum_that_is_derived() -> None:
    """sum_l ( prod_{m>l} (1+a_m)(1+f_m) ) injected_l."""
    attention, ffn, injected = ([0.5, 2.0, 0.25], [3.0, 0.125, 1.0], [2.0, 0.5, 4.0])
    bound = 0.0
    for constants in zip(attention, ffn, injected, strict=True):
        bound = next_bound(bound, *constants)
    growth = [math.prod((1 + attention[m]) * (1 + ffn[m]) for m in range(layer + 1, 3)) for layer in range(3)]
    assert bound == pytest.approx(sum(g * s for g, s in zip(growth, injected, strict=True)))


def narrow_layer(width: int, seed: int, heads: int = 1) -> DecoderLayer:
    """So narrow that its constants are nearly reached, and one that is too small would show."""
    generator = torch.Generator().manual_seed(seed)
    config = TextConfig(
        vocab_size=8, hidden_size=width, intermediate_size=1, num_layers=1, num_heads=heads, num_kv_heads=1, head_dim=2
    )
    layer = DecoderLayer(config).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) + 0.2)
    return layer


@torch.no_grad()
def test_the_constant_of_the_ffn_is_never_passed_and_nearly_reached() -> None:
    generator = torch.Generator().manual_seed(0)
    reached = []
    for seed in range(200):
        layer = narrow_layer(2, seed)
        norms = WeightNorms.of(layer)
        for spread in (1e-3, 0.1, 3.0):
            rows = torch.randn(1, 2, generator=generator, dtype=torch.float64)
            others = rows + spread * torch.randn(1, 2, generator=generator, dtype=torch.float64)
            gain = (layer.ffn(layer.norm2(rows)) - layer.ffn(layer.norm2(others))).norm() / (rows - others).norm()
            reached.append(float(gain) / ffn_constant(norms, layer, rows, others))
    assert max(reached) <= 1
    assert max(reached) > 0.8


def attention_reached(layer: DecoderLayer, rows: Tensor, others: Tensor, turn: float = 1.0) -> float:
    """The gain of attention between two [1, L, D], as a share of the constant for them. `turn`: RoPE's angle a row."""
    num_rows = rows.shape[1]
    angles = turn * torch.arange(num_rows, dtype=torch.float64)[None, :, None]
    rope, mask = (angles.cos(), angles.sin()), torch.ones(num_rows, num_rows, dtype=torch.bool).tril()
    one, other = (layer.attention.project(layer.norm1(each), rope) for each in (rows, others))
    scores = other[0][0] @ other[1][0].mT / math.sqrt(layer.attention.head_dim)
    sums = scores.masked_fill(~mask, -torch.inf).softmax(-1).sum(-2).amax(-1)
    least = min(float(row_rms(each, layer.norm1).min()) for each in (rows, others))
    constant = attention_constant(WeightNorms.of(layer), other[0][0], one[1][0], one[2][0], sums, least)
    attended = [layer.attention.attend(*each, mask[None, None]) for each in (one, other)]
    return float((attended[0] - attended[1]).norm() / (rows - others).norm()) / constant


@torch.no_grad()
def test_the_constant_of_attention_is_never_passed_and_nearly_reached() -> None:
    """With one row, softmax has nothing to say and V alone counts; with several every part does."""
    generator = torch.Generator().manual_seed(0)
    reached: dict[int, list[float]] = {1: [], 2: [], 3: []}
    for seed in range(100):
        layer = narrow_layer(2, seed, heads=2)
        for num_rows in reached:
            for spread in (1e-3, 0.1, 3.0):
                rows = torch.randn(1, num_rows, 2, generator=generator, dtype=torch.float64)
                others = rows + spread * torch.randn(rows.shape, generator=generator, dtype=torch.float64)
                reached[num_rows].append(attention_reached(layer, rows, others))
    assert max(map(max, reached.values())) <= 1
    assert max(reached[1]) > 0.8
    assert max(reached[3]) > 0.3


@pytest.mark.parametrize(("part", "row", "least"), [("q", 1, 0.95), ("k", 0, 0.45)])
@torch.no_grad()
def test_what_softmax_may_do_is_nearly_reached(part: str, row: int, least: float) -> None:
    """Two rows that look at both alike, where softmax is steepest, and a query or a key that is about to turn.

    Of a key half can be seen: the constant allows for every row asking for it, and for scores that all move apart.
    """
    layer = narrow_layer(2, 0)
    steep = torch.tensor([[0, 1e4], [0, 0]], dtype=torch.float64)
    along = torch.tensor([[1.0, 0], [0, 0]], dtype=torch.float64)
    for parameter in layer.norm1.parameters():
        parameter.fill_(1)
    for name in "qkv":
        getattr(layer.attention, name).weight.copy_(along)
    layer.attention.o.weight.copy_(torch.eye(2))
    getattr(layer.attention, part).weight.copy_(steep)
    rows = torch.tensor([[[1.0, 0], [-1, 0]]], dtype=torch.float64)
    others = rows.clone()
    others[0, row, 1] = 1e-6
    assert least < attention_reached(layer, rows, others, turn=0) <= 1


@pytest.mark.parametrize("shape", [(7, 3), (3, 7), (2, 5, 4), (1, 1)])
def test_spectral_norms_are_the_largest_singular_values(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    np.testing.assert_allclose(spectral_norm(matrix), np.linalg.norm(matrix.numpy(), 2, (-2, -1)), rtol=1e-12)
    assert float(spectral_norm(torch.zeros(3, 2))) == 0


def test_several_prompts_have_a_mean_a_lowest_and_a_highest() -> None:
    model, ids = tiny_model(), PROMPTS["image-between"]
    made = [batch_of(model, [ids], seed) for seed in range(3)]
    found = list(measure(model, [Sample(ids, each.visual, each.layouts[0]) for each in made]))
    spread = Spread.of(found)
    for field in fields(Profile):
        each = np.stack([getattr(profile, field.name) for profile in found])
        for reduced, expected in (
            (spread.mean, each.mean(0)),
            (spread.lowest, each.min(0)),
            (spread.highest, each.max(0)),
        ):
            np.testing.assert_array_equal(getattr(reduced, field.name), expected)
    assert (spread.lowest.error < spread.highest.error).all()


@pytest.mark.parametrize("ids", [PROMPTS["text-only"], PROMPTS["image-last"]])
def test_a_prompt_without_picture_or_text_behind_it_is_refused(ids: list[int]) -> None:
    model = tiny_model()
    made = batch_of(model, [ids])
    sample = Sample(ids, made.visual, TokenLayout.of(ids, IMAGE, model.config))
    with pytest.raises(ProfileError, match="text behind"):
        list(measure(model, [sample]))

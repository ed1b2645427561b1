"""The multi-scale resampler against plain loops: its maths, its layout, what Skip-Vision makes of it, what it costs."""

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
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from skipvision.checkpoint import load_checkpoint, save_checkpoint
from skipvision.config import (
    ConfigError,
    ModelConfig,
    ResamplerConfig,
    Selector,
    SkipConfig,
    TextConfig,
    TilesConfig,
    VisionConfig,
)
from skipvision.cost import decoder_flops, dense, projector_flops, prompt_cost, split_flops
from skipvision.estimate import estimate
from skipvision.layout import BatchLayout, ImageSpan, TokenLayout
from skipvision.model import SkipVisionModel
from skipvision.presets import PRESETS, Setting
from skipvision.resampler import Resampler, expand_resampler
from skipvision.training.scratch_recipe import ScratchRecipe
from tests.skipvision import reference
from tests.skipvision.reference import Array, Weights, gelu, layer_norm, linear, softmax
from tests.skipvision.tiny import IMAGE, TOLERANCE, VOCAB, tiny_model

EXAMPLE = Path(__file__).parents[2] / "examples/cos-llama-3-8b/config.json"
SCALES = ResamplerConfig(windows=(8, 4, 2), queries=(3, 2, 2), num_heads=3, mlp_ratio=3)
"""On a grid of 8: 3 + 8 + 32 tokens."""
SKIP = SkipConfig(num_retained=11, num_skipped=6, selector="first", num_unpooled=3)
LAYOUTS = {
    "three-scales": SCALES,
    "one-scale": ResamplerConfig((4,), (3,), 4, 1),
    "windows-of-a-patch": ResamplerConfig((8, 1), (2, 1), 2, 2),
    "one-grid-twice": ResamplerConfig((4, 4), (1, 3), 6, 2),
}


def cos_config(skip: SkipConfig | None = SKIP, resampler: ResamplerConfig = SCALES) -> ModelConfig:
    vision = VisionConfig(
        image_size=32,
        patch_size=4,
        hidden_size=24,
        intermediate_size=40,
        num_layers=3,
        num_heads=2,
        feature_layers=(1, 3),
        select_layer=2,
        feature_norm=False,
    )
    text = TextConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=10,
        tie_embeddings=False,
    )
    return ModelConfig(
        vision, text, skip, projector="resampler", resampler=resampler, projector_norm=False, projector_position=False
    )


def pictures(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 32, 32, generator=generator, dtype=torch.float64)


def random_features(config: ModelConfig, count: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = count, config.vision.num_patches, config.vision.feature_size
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# --- the same in loops -----------------------------------------------------------------------------------------------


def normed(weights: Weights, name: str, row: Array) -> Array:
    return layer_norm(row, weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)


def look(weights: Weights, name: str, num_heads: int, query: Array, window: list[Array]) -> Array:
    """One query at one window: cross-attention, then the MLP, each beside a residual."""
    width = len(query)
    asked = linear(weights, f"{name}.q", normed(weights, f"{name}.norm_query", query)).reshape(num_heads, -1)
    told = [linear(weights, f"{name}.kv", normed(weights, f"{name}.norm_patches", patch)) for patch in window]
    keys = [each[:width].reshape(num_heads, -1) for each in told]
    values = [each[width:].reshape(num_heads, -1) for each in told]
    mixed = []
    for head in range(num_heads):
        shares = softmax([float(asked[head] @ key[head]) / math.sqrt(len(asked[head])) for key in keys])
        mixed.append(sum(share * value[head] for share, value in zip(shares, values, strict=True)))
    query = query + linear(weights, f"{name}.out", np.concatenate(mixed))
    grown = gelu(linear(weights, f"{name}.fc1", normed(weights, f"{name}.norm_mlp", query)))
    return np.asarray(query + linear(weights, f"{name}.fc2", grown))


def resample(weights: Weights, config: ModelConfig, features: Array) -> Array:
    """One picture's patches [P, F] to tokens [T, D]."""
    resampler, grid, width = config.resampler, config.vision.grid, config.vision.hidden_size
    assert resampler is not None
    tokens = []
    for scale, (side, num_queries) in enumerate(zip(resampler.windows, resampler.queries, strict=True)):
        learned = iter(weights[f"projector.queries.{scale}"])
        for top in range(0, grid, side):
            for left in range(0, grid, side):
                places = [
                    line * grid + column for line in range(top, top + side) for column in range(left, left + side)
                ]
                for _ in range(num_queries):
                    query = next(learned)
                    for level in range(len(config.vision.feature_layers)):
                        window = [features[place][level * width : (level + 1) * width] for place in places]
                        name = f"projector.levels.{level}.{scale}"
                        query = look(weights, name, resampler.num_heads, query, window)
                    tokens.append(linear(weights, "projector.output", normed(weights, "projector.norm", query)))
        assert next(learned, None) is None
    return np.array(tokens)


def split(weights: Weights, skip: SkipConfig, tokens: Array, image: int) -> list[reference.Row]:
    """Coarse tokens, the summary of those behind the global ones, the merged fine tokens, their summary."""
    coarse, fine = tokens[: skip.num_retained], reference.merge(tokens[skip.num_retained :], skip.num_skipped)
    pooled = reference.summarise(weights, coarse[skip.num_unpooled :])
    return [
        *(reference.Row(token, reference.RETAINED, image) for token in coarse),
        reference.Row(pooled, reference.SUMMARY, image),
        *(reference.Row(token, reference.SKIPPED, image) for token in fine),
        reference.Row(reference.summarise(weights, fine), reference.SUMMARY, image),
    ]


# --- what it computes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resampler", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_tokens_agree_with_plain_loops(resampler: ResamplerConfig) -> None:
    model = tiny_model(cos_config(None, resampler))
    features, weights = random_features(model.config, 2), reference.weights_of(model)
    with torch.no_grad():
        tokens = model.projector(features)
    assert tokens.shape[1] == model.config.num_tokens
    for picture, ours in zip(features, tokens, strict=True):
        # fp64 on both sides.
        np.testing.assert_allclose(ours.numpy(), resample(weights, model.config, picture.numpy()), rtol=0, atol=1e-10)


def test_a_query_sees_its_own_window_alone_coarse_before_fine() -> None:
    config = cos_config(None)
    model, features = tiny_model(config), random_features(config)
    with torch.no_grad():
        before = model.projector(features)[0]
        for line, column in ((0, 0), (0, 7), (3, 4), (6, 1), (7, 7)):
            touched = features.clone()
            touched[0, line * 8 + column] += torch.linspace(0, 1, 48)
            changed = (model.projector(touched)[0] != before).any(1).nonzero().flatten().tolist()
            middle, fine = line // 4 * 2 + column // 4, line // 2 * 4 + column // 2
            whole = [0, 1, 2]
            assert changed == [*whole, 3 + 2 * middle, 4 + 2 * middle, 11 + 2 * fine, 12 + 2 * fine]


def test_both_layers_of_the_encoder_are_read() -> None:
    config = cos_config(None)
    model, features = tiny_model(config), random_features(config)
    with torch.no_grad():
        before = model.projector(features)
        for level in range(2):
            touched = features.clone()
            touched[..., 24 * level : 24 * (level + 1)] += torch.linspace(0, 1, 24)
            assert (model.projector(touched) != before).any(-1).all()


def test_the_coarse_scales_are_retained_and_the_fine_one_is_merged() -> None:
    model = tiny_model(cos_config())
    weights = reference.weights_of(model)
    with torch.no_grad():
        features, _ = model.vision(pictures(2))
        visual = model.encode_images(pictures(2))
    assert visual.shape == (2, 11 + 1 + 6 + 1, 32)
    for picture, ours in zip(features, visual, strict=True):
        rows = split(weights, SKIP, resample(weights, model.config, picture.numpy()), 0)
        # The summary's softmax is fp32.
        expected = np.array([row.vector for row in rows])
        np.testing.assert_allclose(ours.numpy(), expected, rtol=0, atol=TOLERANCE[torch.float64])


def test_the_first_summary_leaves_the_global_tokens_out() -> None:
    model = tiny_model(cos_config())
    with torch.no_grad():
        tokens = model.projector(model.vision(pictures(1)).features)
        other = tokens.clone()
        other[:, :3] += 1
        paid = tokens.new_zeros(1, 43)
        before, after = model.split(tokens, paid)[0], model.split(other, paid)[0]
        pooled_all = model.with_skip(replace(SKIP, num_unpooled=0)).split(tokens, paid)[0]
    assert (before != after).any(1).nonzero().flatten().tolist() == [0, 1, 2]
    assert (before != pooled_all).any(1).nonzero().flatten().tolist() == [11]


@pytest.mark.parametrize("visibility", ["image", "all"])
def test_logits_agree_with_the_naive_reference(visibility: Any) -> None:
    model = tiny_model(cos_config(replace(SKIP, visibility=visibility)))
    config, weights = model.config, reference.weights_of(model)
    ids = [20, IMAGE, 21, 22, IMAGE, 23]
    layout = TokenLayout.of(ids, IMAGE, config)
    with torch.no_grad():
        features, _ = model.vision(pictures(2))
        visual = model.encode_images(pictures(2))
        logits = model(torch.tensor([ids]), visual, BatchLayout.of([layout], len(ids)))[0].numpy()
    assert config.skip is not None
    rows: list[reference.Row] = []
    images = iter(range(2))
    for token in ids:
        if token == IMAGE:
            image = next(images)
            rows += split(weights, config.skip, resample(weights, config, features[image].numpy()), image)
        else:
            rows.append(reference.Row(weights["decoder.embed.weight"][token], reference.TEXT))
    expected = reference.forward(weights, config.text, rows, visibility).logits
    assert len(expected) == layout.num_kept
    for row in range(layout.num_kept):
        place = int(layout.positions[row])
        np.testing.assert_allclose(logits[row], expected[place], rtol=0, atol=TOLERANCE[torch.float64])


def test_gradients_reach_every_weight_of_the_resampler_and_the_pixels() -> None:
    model = tiny_model(cos_config())
    pixels = pictures(2).requires_grad_()
    ids = [20, IMAGE, 21, IMAGE, 22]
    batch = BatchLayout.of([TokenLayout.of(ids, IMAGE, model.config)], len(ids))
    model(torch.tensor([ids]), model.encode_images(pixels), batch).logsumexp(-1).sum().backward()
    assert pixels.grad is not None
    assert (pixels.grad != 0).all()
    for name, parameter in model.projector.named_parameters():
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()
        assert (parameter.grad != 0).any(), name


def test_a_gradient_is_the_slope_of_the_loss() -> None:
    config = cos_config(None, ResamplerConfig((8, 4), (2, 1), 3, 1))
    resampler = tiny_model(config).projector
    features = random_features(config).requires_grad_()
    assert torch.autograd.gradcheck(resampler, (features,), fast_mode=True)


@pytest.mark.parametrize("selector", ["random", "uniform"])
def test_baselines_choose_among_the_tokens(selector: Selector) -> None:
    model = tiny_model(cos_config(SkipConfig(5, 4, selector)))
    with torch.no_grad():
        assert model.encode_images(pictures(1)).shape == (1, 5 + 1 + 4 + 1, 32)


def test_a_plain_resampler_learns_to_skip_with_its_own_weights(tmp_path: Path) -> None:
    plain = tiny_model(cos_config(None), dtype=torch.float32)
    model = plain.with_skip(SKIP)
    names = dict(plain.projector.named_parameters())
    assert all(each.data_ptr() == names[name].data_ptr() for name, each in model.projector.named_parameters())
    save_checkpoint(model, tmp_path / "cos", {})
    again = load_checkpoint(tmp_path / "cos")
    assert again.config == model.config
    with torch.no_grad():
        ours, theirs = (each.encode_images(pictures(1).float()) for each in (model, again))
    assert torch.equal(ours, theirs)


# --- 224 to 448 pixels, 80 to 1,296 queries --------------------------------------------------------------------------


def sizes_of(image_size: int, windows: tuple[int, ...], queries: tuple[int, ...]) -> ModelConfig:
    """The published grids and counts, in a narrow model."""
    vision = VisionConfig(
        image_size=image_size,
        hidden_size=8,
        intermediate_size=8,
        num_layers=2,
        num_heads=2,
        feature_layers=(1, 2),
        select_layer=1,
        feature_norm=False,
    )
    resampler = replace(SCALES, windows=windows, queries=queries, num_heads=2)
    return replace(cos_config(None), vision=vision, resampler=resampler)


BEFORE, AFTER = sizes_of(224, (16, 4), (16, 4)), sizes_of(448, (32, 4, 2), (16, 4, 4))


def resampler_of(config: ModelConfig) -> Resampler:
    found = tiny_model(config).projector
    assert isinstance(found, Resampler)
    return found


def test_80_queries_become_1296_each_where_it_stood() -> None:
    assert (BEFORE.num_tokens, AFTER.num_tokens) == (80, 1296)
    source = resampler_of(BEFORE)
    target = expand_resampler(source, AFTER)
    assert [len(each) for each in target.queries] == [16, 256, 1024]
    assert torch.equal(target.queries[0], source.queries[0])
    for scale, side, times in ((1, 8, 2), (2, 16, 4)):
        for line in range(side):
            for column in range(side):
                start, origin = 4 * (line * side + column), 4 * (line // times * 4 + column // times)
                assert torch.equal(target.queries[scale][start : start + 4], source.queries[1][origin : origin + 4])


def test_an_expanded_resampler_has_copies_of_all_other_weights() -> None:
    source = resampler_of(BEFORE)
    target = expand_resampler(source, AFTER)
    old, new = source.state_dict(), target.state_dict()
    assert new.keys() == SkipVisionModel(AFTER).projector.state_dict().keys()
    for name, tensor in new.items():
        part, *rest = name.split(".")
        if part == "queries":
            continue
        if part == "levels":
            rest[1] = {"0": "0", "1": "1", "2": "1"}[rest[1]]
        origin = old[".".join((part, *rest))]
        assert torch.equal(tensor, origin)
        assert tensor.data_ptr() != origin.data_ptr()


def test_where_windows_are_even_an_expanded_resampler_says_what_its_source_did() -> None:
    source = resampler_of(BEFORE)
    target = expand_resampler(source, AFTER)
    # Attention takes the mean of what is equal, however often it is there.
    windows = torch.randn(1, 4, 4, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    small, large = (windows.repeat_interleave(n, 1).repeat_interleave(n, 2).flatten(1, 2) for n in (4, 8))
    with torch.no_grad():
        before, after = source(small)[0], target(large)[0]
    torch.testing.assert_close(after[:16], before[:16], rtol=0, atol=1e-10)
    grid = before[16:].view(4, 4, 4, -1)
    for first, count, times in ((16, 256, 2), (272, 1024, 4)):
        expected = grid.repeat_interleave(times, 0).repeat_interleave(times, 1).flatten(0, 2)
        torch.testing.assert_close(after[first : first + count], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("after", "scale_map", "words"),
    [
        (AFTER, (0, 1), "scale_map must name one of 2 scales for each of 3"),
        (AFTER, (0, 1, 2), "scale_map must name one of 2 scales for each of 3"),
        (AFTER, (0, 0, 1), "scale 1 cannot repeat its source: 1 windows a side of 16 cannot become 8 of 4 queries"),
        (sizes_of(448, (32, 16, 2), (16, 4, 4)), (0, 1, 1), "scale 1 cannot repeat its source: 4 windows"),
        (replace(AFTER, text=replace(AFTER.text, hidden_size=30)), (0, 1, 1), "weights of another size: size mismatch"),
        (replace(AFTER, resampler=replace(SCALES, windows=(32, 4, 2), num_heads=4)), (0, 1, 1), "num_heads: 2 cannot"),
        (replace(cos_config(None), projector="linear", resampler=None), (0, 1, 1), "to a resampler alone"),
    ],
)
def test_what_cannot_be_expanded_is_said(after: ModelConfig, scale_map: tuple[int, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        expand_resampler(resampler_of(BEFORE), after, scale_map)
    assert "\n" not in str(caught.value)


# --- counts, costs, refusals -----------------------------------------------------------------------------------------


def test_the_example_has_the_papers_counts_and_share() -> None:
    config = ModelConfig.from_json(EXAMPLE.read_text())
    assert config.resampler == ResamplerConfig()
    assert config.resampler.token_counts(config.vision.grid) == (16, 256, 1024)
    assert (config.vision.grid, config.num_tokens) == (32, 1296)
    span = ImageSpan.of(config)
    assert (span.num_retained, span.num_skipped, span.num_summary, span.length) == (272, 256, 2, 530)
    layout = TokenLayout((span,))
    plain, plain_layout = dense(config, layout)
    assert (plain_layout.length, layout.num_kept) == (1296, 274)
    assert round(100 * decoder_flops(config.text, layout) / decoder_flops(plain.text, plain_layout), 1) == 24.6


def test_on_the_example_the_papers_setting_is_its_own() -> None:
    config = ModelConfig.from_json(EXAMPLE.read_text())
    setting = PRESETS["sv-cos-272"]
    assert setting.skip_config(config) == config.skip
    found = estimate(config, setting, 7)
    layout = TokenLayout((7, ImageSpan.of(config)))
    assert found.skipped.vision_flops == prompt_cost(config, layout).vision_flops
    assert found.dense.vision_flops == prompt_cost(*dense(config, layout)).vision_flops


def test_counts_alone_mean_the_papers_setting() -> None:
    config = ModelConfig.from_json(EXAMPLE.read_text())
    plain = replace(config, skip=None)
    assert plain.skip_of(272, 256) == config.skip
    assert plain.skip_of(16, 0) == SkipConfig(16, 0, "first", "all")
    assert config.skip_of(272, 100) == SkipConfig(272, 100, "first", "all", 16)


def test_a_setting_is_for_a_resampler_or_for_patches() -> None:
    config = ModelConfig.from_json(EXAMPLE.read_text())
    ranked = Setting("By rank", 1296, 272, 256)
    with pytest.raises(ConfigError, match=r"^By rank ranks patches, and this model has a resampler's tokens$"):
        ranked.skip_config(config)
    # 36 x 36 patches are as many tokens.
    vision = replace(config.vision, image_size=36 * 14)
    patches = replace(config, vision=vision, skip=None, projector="linear", resampler=None)
    assert ranked.skip_config(patches) == SkipConfig(272, 256, "cls_attention", "all")
    with pytest.raises(ConfigError, match=r"^SV-CoS needs a resampler, and this model has none$"):
        PRESETS["sv-cos-272"].skip_config(patches)


def counted(call: Callable[[], object]) -> int:
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("resampler", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_flops_are_those_that_torch_runs(resampler: ResamplerConfig) -> None:
    model = tiny_model(cos_config(None, resampler))
    features = random_features(model.config)
    assert projector_flops(model.config) == counted(lambda: model.projector(features))


def test_the_split_costs_what_torch_runs() -> None:
    model = tiny_model(cos_config())
    tokens = torch.randn(1, 43, 32, dtype=torch.float64)
    assert split_flops(model.config) == counted(lambda: model.split(tokens, tokens.new_zeros(1, 43)))
    setting = Setting("", 43, 11, 6, is_ranked=False, num_unpooled=3)
    layout = TokenLayout((ImageSpan.of(model.config),))
    found = estimate(model.config, setting, 0).skipped.vision_flops
    assert found == prompt_cost(model.config, layout).vision_flops


def test_a_config_comes_back_from_its_file_as_it_was() -> None:
    assert ModelConfig.from_json(cos_config().to_json()) == cos_config()
    assert json.loads(cos_config().to_json())["resampler"]["windows"] == [8, 4, 2]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"windows": (8, 3, 2)}, "resampler.windows must divide 8, the patches along one side"),
        ({"windows": (2, 4, 8)}, "resampler.windows must stand coarse before fine"),
        ({"windows": (8, 4)}, "resampler.queries needs a number for each of 2 scales, got 3"),
        ({"windows": (), "queries": ()}, "resampler.windows must name at least one scale"),
        ({"windows": (8, 4, 0)}, "resampler.windows must be finite and positive, got 0"),
        ({"queries": (3, 2, -1)}, "resampler.queries must be finite and positive, got -1"),
        ({"num_heads": 5}, "resampler.num_heads must divide vision.hidden_size 24"),
        ({"mlp_ratio": 0}, "resampler.mlp_ratio must be finite and positive, got 0"),
    ],
)
def test_scales_that_cannot_be_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"^{words}$"):
        cos_config(None, replace(SCALES, **changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"resampler": None}, "projector resampler and a table resampler need each other"),
        ({"projector": "mlp"}, "projector resampler and a table resampler need each other"),
        ({"projector_norm": True}, "projector_norm: a resampler has a norm of its own; set it to false"),
        (
            {"projector_position": True},
            "projector_convs and projector_position need projector mlp, and pixel_shuffle 1",
        ),
        ({"projector_convs": 1}, "projector_convs and projector_position need projector mlp, and pixel_shuffle 1"),
        ({"pixel_shuffle": 2}, "pixel_shuffle: a resampler takes patches one by one; set it to 1"),
        ({"tiles": TilesConfig(longest_edge=64)}, "tiles: a resampler sees a picture once; leave them out"),
        ({"skip": SkipConfig(11, 33, "first")}, r"skip.num_skipped must be at most 32 \(what is not retained\)"),
        ({"skip": SkipConfig(10, 6, "first")}, "skip.selector first retains 3 or 11 or 43 tokens, not 10"),
        (
            {"skip": SkipConfig(11, 6)},
            "skip.selector cls_attention ranks patches, and a resampler's tokens are none; first does not",
        ),
        (
            {"skip": SkipConfig(11, 6, "received_attention")},
            "skip.selector received_attention ranks patches, and a resampler's tokens are none; first does not",
        ),
    ],
)
def test_combinations_that_are_not_known_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"^{words}$"):
        replace(cos_config(), **changes)


def test_first_needs_something_that_stands_in_front() -> None:
    vision = cos_config().vision
    with pytest.raises(ConfigError, match=r"^skip\.selector first needs tiles that are joined to a thumbnail, or a"):
        ModelConfig(vision, cos_config().text, SkipConfig(11, 6, "first"))
    tiles = TilesConfig(((64, 64),))
    joined = replace(cos_config(None), projector="mlp", resampler=None, tiles=tiles)
    assert replace(joined, skip=SkipConfig(64, 6, "first")).num_retained == 64
    with pytest.raises(ConfigError, match=r"^skip\.selector first retains 64 tokens, not 11$"):
        replace(joined, skip=SkipConfig(11, 6, "first"))


def test_what_the_summary_leaves_out_is_in_front_and_not_all() -> None:
    with pytest.raises(ConfigError, match=r"^skip\.num_unpooled must leave some of the 11 retained tokens, got 11$"):
        replace(SKIP, num_unpooled=11)
    with pytest.raises(ConfigError, match=r"^skip\.num_unpooled must be finite and at least 0, got -1$"):
        replace(SKIP, num_unpooled=-1)
    with pytest.raises(ConfigError, match=r"^skip\.num_unpooled needs skip\.selector first"):
        replace(SKIP, selector="uniform")


def test_a_recipe_says_that_it_cannot_train_one() -> None:
    for skip in (SkipConfig(11, 6, "uniform"), None):
        with pytest.raises(ConfigError, match=r"^model\.projector: training needs one token for each patch"):
            ScratchRecipe(cos_config(skip))

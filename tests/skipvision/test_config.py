"""A config that cannot work is refused by name; one that can survives its file."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skipvision.config import ConfigError, ModelConfig, SkipConfig, TextConfig, TilesConfig, VisionConfig
from tests.skipvision.tiny import SKIPS, tiny_config

EPSILONS = st.floats(1e-12, 1e-3)


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Any config that can work."""
    size = st.integers(1, 64)
    patch_size, grid, num_layers, heads, shared = (draw(st.integers(1, 8)) for _ in range(5))
    has_cls, reads_last = draw(st.booleans()), draw(st.booleans())
    channel = st.tuples(*[st.floats(0.01, 1)] * 3)
    vision = VisionConfig(
        image_size=patch_size * grid + draw(st.integers(0, patch_size - 1)),
        patch_size=patch_size,
        hidden_size=heads * draw(size),
        intermediate_size=draw(size),
        num_layers=num_layers,
        num_heads=heads,
        layer_norm_eps=draw(EPSILONS),
        feature_layers=(num_layers,)
        if reads_last
        else tuple(draw(st.lists(st.integers(0, num_layers), min_size=1, max_size=4))),
        select_layer=draw(st.integers(1, num_layers)),
        image_mean=draw(channel),
        image_std=draw(channel),
        activation=draw(st.sampled_from(["gelu", "gelu_tanh", "quick_gelu"])),
        has_cls=has_cls,
        embedding_norm=draw(st.booleans()),
        output_norm=reads_last and draw(st.booleans()),
        feature_norm=draw(st.booleans()),
    )
    text = TextConfig(
        vocab_size=draw(st.integers(1, 100_000)),
        hidden_size=draw(size),
        intermediate_size=draw(size),
        num_layers=num_layers,
        num_heads=heads * shared,
        num_kv_heads=heads,
        head_dim=2 * draw(size),
        rope_theta=draw(st.floats(2, 1e7)),
        rms_norm_eps=draw(EPSILONS),
        tie_embeddings=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        max_positions=draw(st.integers(0, 10_000)),
    )
    counts = st.integers(1, 4)
    sizes = tuple(
        (vision.image_size * lines, vision.image_size * columns)
        for lines, columns in draw(st.lists(st.tuples(counts, counts), min_size=1, max_size=4))
    )
    tiles = draw(
        st.none()
        | st.builds(TilesConfig, st.just(sizes), max_tiles=counts, among_others=st.booleans())
        | st.builds(TilesConfig, longest_edge=st.integers(1, 5000))
    )
    skip = None
    if draw(st.booleans()):
        retained = draw(st.integers(1, grid**2))
        skip = SkipConfig(
            retained,
            draw(st.integers(0, grid**2 - retained)),
            draw(st.sampled_from(["cls_attention"] * has_cls + ["received_attention", "random", "uniform"])),
            draw(st.sampled_from(["image", "all"])),
        )
    return ModelConfig(
        vision, text, skip, tiles, projector_convs=draw(st.integers(0, 3)), projector_position=draw(st.booleans())
    )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(configs())
def test_a_config_comes_back_from_its_file_as_it_was(config: ModelConfig) -> None:
    assert ModelConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("skip", SKIPS.values(), ids=SKIPS.keys())
def test_the_file_names_every_field(skip: SkipConfig | None) -> None:
    config = tiny_config(skip)
    assert json.loads(config.to_json()) == json.loads(json.dumps(asdict(config)))


def altered(path: str, value: Any) -> str:
    """A good config as JSON, with one value exchanged."""
    data = json.loads(tiny_config().to_json())
    *tables, key = path.split(".")
    table = data
    for name in tables:
        table = table[name]
    table[key] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "vison",
            {},
            (
                "config: unknown key 'vison'; known: pixel_shuffle, projector, "
                "projector_convs, projector_norm, projector_position, projector_size, projector_trained, resampler, "
                "skip, skip_trained, text, tiles, vision; did you mean vision\\?$"
            ),
        ),
        ("vision.patchsize", 4, "vision: unknown key 'patchsize'; known: .*patch_size"),
        ("text.window", 4, "text: unknown key 'window'"),
        ("skip.ratio", 0.5, "skip: unknown key 'ratio'"),
    ],
)
def test_unknown_keys_are_errors_that_list_the_known_ones(path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        ModelConfig.from_json(altered(path, value))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("vision", None, "vision: expected a table, got NoneType"),
        ("vision", [], "vision: expected a table, got list"),
        ("skip", 5, "skip: expected a table, got int"),
        ("vision.image_size", "16", "vision.image_size: expected int, got '16'"),
        ("vision.image_size", 16.0, "vision.image_size: expected int, got 16.0"),
        ("vision.image_size", True, "vision.image_size: expected int, got True"),
        ("vision.image_size", None, "vision.image_size: expected int, got None"),
        ("vision.feature_layers", 3, "vision.feature_layers: expected a list, got 3"),
        ("vision.feature_layers", [1, "2"], "vision.feature_layers: expected int, got '2'"),
        ("vision.image_mean", [0.5, 0.5], "vision.image_mean: expected 3 values, got 2"),
        ("text.rms_norm_eps", "small", "text.rms_norm_eps: expected float, got 'small'"),
        ("text.rms_norm_eps", True, "text.rms_norm_eps: expected float, got True"),
        ("text.tie_embeddings", 1, "text.tie_embeddings: expected bool, got 1"),
        (
            "skip.selector",
            "best",
            (
                "skip.selector: expected one of 'cls_attention', 'received_attention', 'first', 'random',"
                " 'uniform', got 'best'$"
            ),
        ),
        ("skip.selector", ["random"], "skip.selector: expected one of"),
        ("skip.visibility", "none", "skip.visibility: expected one of 'image', 'all', got 'none'"),
        ("projector_position", "yes", "projector_position: expected bool, got 'yes'"),
    ],
)
def test_values_of_the_wrong_type_are_named_with_what_was_expected(path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        ModelConfig.from_json(altered(path, value))


def test_whole_numbers_are_good_for_fractions() -> None:
    theta = ModelConfig.from_json(altered("text.rope_theta", 500000)).text.rope_theta
    assert theta == 500000.0
    assert isinstance(theta, float)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("vision.patch_size", 17),
        ("vision.num_heads", 5),
        ("vision.feature_layers", []),
        ("vision.feature_layers", [4]),
        ("vision.feature_layers", [-1]),
        ("vision.select_layer", 0),
        ("vision.select_layer", 4),
        ("text.num_kv_heads", 3),
        ("text.head_dim", 9),
        ("skip.num_retained", 0),
        ("skip.num_retained", 17),
        ("skip.num_skipped", -1),
        ("skip.num_skipped", 12),
    ],
)
def test_values_out_of_range_are_named(path: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{path}\b"):
        ModelConfig.from_json(altered(path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *(
            (f"vision.{name}", 0)
            for name in ("image_size", "patch_size", "hidden_size", "intermediate_size", "num_heads")
        ),
        *(
            (f"text.{name}", 0)
            for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
        ),
        ("vision.patch_size", -4),
        ("vision.num_heads", -2),
        ("vision.layer_norm_eps", -1e-6),
        ("vision.image_std", [0.2, 0.0, 0.2]),
        ("text.num_kv_heads", 0),
        ("text.num_kv_heads", -2),
        ("text.head_dim", 0),
        ("text.rope_theta", 0.0),
        ("text.rope_theta", float("inf")),
        ("text.rms_norm_eps", float("nan")),
        ("vision.num_layers", 0),
        ("vision.image_mean", [0.5, float("-inf"), 0.5]),
        ("vision.feature_layers", [2, -1]),
    ],
)
def test_sizes_are_positive_and_numbers_finite(path: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{path}\b"):
        ModelConfig.from_json(altered(path, value))


@pytest.mark.parametrize("name", ["best", ""])
def test_a_config_made_in_code_is_checked_as_well(name: Any) -> None:
    with pytest.raises(ConfigError, match=r"^skip\.selector: unknown"):
        SkipConfig(selector=name)
    with pytest.raises(ConfigError, match=r"^skip\.visibility: unknown"):
        SkipConfig(visibility=name)


@pytest.mark.parametrize("text", ["", "{", "nonsense", '{"vision": }'])
def test_what_is_no_json_is_said(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^not JSON: "):
        ModelConfig.from_json(text)


@pytest.mark.parametrize(("text", "kind"), [("[]", "list"), ("null", "NoneType"), ("3", "int")])
def test_json_of_another_shape_is_said(text: str, kind: str) -> None:
    with pytest.raises(ConfigError, match=f"^config: expected a table, got {kind}$"):
        ModelConfig.from_json(text)


def test_a_missing_part_is_named() -> None:
    data = json.loads(tiny_config().to_json())
    del data["vision"]
    with pytest.raises(ConfigError, match=r"^config: missing key 'vision'$"):
        ModelConfig.from_json(json.dumps(data))


def test_what_patches_leave_over_of_a_picture_is_not_counted() -> None:
    """384 pixels in patches of 14 are 27 of them, and 6 pixels at the edge."""
    vision = VisionConfig(image_size=384, patch_size=14)
    assert (vision.grid, vision.num_patches, vision.num_rows) == (27, 729, 730)
    assert VisionConfig(image_size=384, patch_size=14, has_cls=False).num_rows == 729
    assert VisionConfig(image_size=14, patch_size=14).num_patches == 1


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("vision.activation", "relu", "vision.activation: expected one of 'gelu', 'gelu_tanh', 'quick_gelu'"),
        ("vision.output_norm", True, "vision.output_norm asks for the last layer as the one that is read"),
        ("vision.has_cls", False, "skip.selector cls_attention needs an encoder with a CLS token"),
        ("text.max_positions", -1, "text.max_positions must be finite and at least 0, got -1"),
        ("projector", "conv", "projector: expected one of 'mlp', 'linear'"),
        ("projector", "linear", "projector_convs and projector_position need projector mlp"),
        ("pixel_shuffle", 2, "projector_convs and projector_position need projector mlp, and pixel_shuffle 1"),
        ("pixel_shuffle", 3, "pixel_shuffle must divide 4, got 3"),
        ("pixel_shuffle", 0, "pixel_shuffle must divide 4, got 0"),
        ("tiles", {"sizes": [[16, 15]]}, "tiles.sizes must be multiples of vision.image_size 16"),
        ("tiles", {"sizes": [[16]]}, "tiles.sizes: expected 2 values, got 1"),
        ("tiles", {}, "tiles: either sizes or longest_edge"),
        ("tiles", {"size": 3}, "tiles: unknown key 'size'; known: among_others, longest_edge, max_tiles, sizes"),
        ("skip.selector", "first", "skip.selector first needs tiles that are joined to a thumbnail"),
    ],
)
def test_parts_that_do_not_go_together_are_named(path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        ModelConfig.from_json(altered(path, value))


def test_joined_tiles_may_skip_more_than_a_thumbnail_has() -> None:
    config = ModelConfig.from_json(altered("tiles", {"sizes": [[32, 32]]}))
    assert config.skip is not None
    assert replace(config, skip=replace(config.skip, num_skipped=1000)).num_skipped == 1000
    with pytest.raises(ConfigError, match="first retains 16 tokens, not 5"):
        replace(config, skip=replace(config.skip, selector="first"))
    thumbnail = SkipConfig(16, 1000, "first")
    assert replace(config, skip=thumbnail).num_retained == 16
    apart = ModelConfig.from_json(altered("tiles", {"longest_edge": 32}))
    with pytest.raises(ConfigError, match="num_skipped must be at most 11"):
        replace(apart, skip=SkipConfig(5, 12))


def test_counts_follow_from_sizes() -> None:
    config = tiny_config()
    assert (config.vision.grid, config.vision.num_patches, config.vision.feature_size) == (4, 16, 48)
    assert (config.num_retained, config.num_skipped) == (5, 4)
    assert (tiny_config(None).num_retained, tiny_config(None).num_skipped) == (16, 0)

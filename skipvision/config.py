"""What a Skip-Vision model is, as frozen dataclasses. Imports no torch, so that chat can read it.

Every field is validated where it is declared; unknown keys in a file are errors, never dropped.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from itertools import accumulate
from typing import Any, Literal, TypeVar, get_args, get_type_hints

ConfigType = TypeVar("ConfigType")

Selector = Literal["cls_attention", "received_attention", "first", "random", "uniform"]
Visibility = Literal["image", "all"]
Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]
ProjectorKind = Literal["mlp", "linear", "resampler"]
Transparency = Literal["white", "dropped"]
"""What a model wants behind transparent parts of a picture: white, or whatever colour they carry."""

SELECTORS = get_args(Selector)
RANKED: tuple[Selector, ...] = ("cls_attention", "received_attention")
"""Selectors that read the encoder's attention."""


class ConfigError(ValueError):
    """A setting that cannot work; the message names the field and what is allowed."""


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def require_numbers(config: object, table: str = "", **at_least: float) -> None:
    """Raises ConfigError unless all numbers in the dataclass `config` are finite and positive.

    Fields named in `at_least` have that bound instead. `table` stands before the name in the message.
    """
    for name, value in vars(config).items():
        bound = f"at least {at_least[name]}" if name in at_least else "positive"
        for number in value if isinstance(value, tuple) else (value,):
            if type(number) in (int, float):
                good = number >= at_least[name] if name in at_least else number > 0
                require(good and abs(number) < math.inf, f"{table}{name} must be finite and {bound}, got {number}")


@dataclass(frozen=True)
class VisionConfig:
    """A pre-norm ViT, read at a few of its layers."""

    image_size: int = 224
    """Side of the square input in pixels."""
    patch_size: int = 14
    """Side of one patch in pixels. What it leaves of the image's right and lower edge is not looked at."""
    hidden_size: int = 384
    intermediate_size: int = 1536
    num_layers: int = 9
    num_heads: int = 6
    layer_norm_eps: float = 1e-6
    feature_layers: tuple[int, ...] = (3, 6, 9)
    """Hidden states handed to the projector, side by side; 0 is the embedding, num_layers the output."""
    select_layer: int = 8
    """Layer (1-based) whose attention ranks the patches."""
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    activation: Activation = "gelu"
    """`quick_gelu` is OpenAI's, x * sigmoid(1.702 x); `gelu_tanh` the approximation by tanh."""
    has_cls: bool = True
    """A CLS token in front of the patches; SigLIP has none."""
    embedding_norm: bool = False
    """A LayerNorm in front of the first layer, as CLIP has."""
    output_norm: bool = False
    """A LayerNorm behind the last layer, as SmolVLM reads it; then that layer alone is read."""
    feature_norm: bool = True
    """Normalise what is handed to the projector, over the channels of each layer that is read; LLaVA does not."""

    def __post_init__(self) -> None:
        require_numbers(self, "vision.", feature_layers=0, image_mean=-math.inf)
        require(self.patch_size <= self.image_size, "vision.patch_size must be at most vision.image_size")
        require(self.hidden_size % self.num_heads == 0, "vision.num_heads must divide vision.hidden_size")
        require(self.activation in get_args(Activation), f"vision.activation: unknown {self.activation!r}")
        require(bool(self.feature_layers), "vision.feature_layers must name at least one layer")
        require(
            max(self.feature_layers) <= self.num_layers,
            f"vision.feature_layers must lie between 0 and {self.num_layers}",
        )
        require(self.select_layer <= self.num_layers, f"vision.select_layer must lie between 1 and {self.num_layers}")
        last_alone = self.feature_layers == (self.num_layers,)
        require(
            last_alone or not self.output_norm, "vision.output_norm asks for the last layer as the one that is read"
        )

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid**2

    @property
    def num_rows(self) -> int:
        """What attends in the encoder: patches, and CLS where there is one."""
        return self.num_patches + int(self.has_cls)

    @property
    def num_layers_run(self) -> int:
        """Layers up to the last one that is read."""
        return max(*self.feature_layers, self.select_layer)

    @property
    def feature_size(self) -> int:
        return self.hidden_size * len(self.feature_layers)


@dataclass(frozen=True)
class SkipConfig:
    """How visual tokens are split before the decoder (Skip-Vision, section 4). None in ModelConfig: plain model."""

    num_retained: int = 96
    """Visual tokens that keep their FFN and their KV rows."""
    num_skipped: int = 64
    """Tokens that the rest is merged to; they pass attention only and leave the KV cache after prefill.
    0 drops the rest outright (the random-drop and uniform-drop baselines)."""
    selector: Selector = "cls_attention"
    """What is retained: the best by the attention that the encoder pays; the `first`, which are the thumbnail of joined
    tiles or the coarse scales of a resampler; or a baseline."""
    visibility: Visibility = "image"
    """Who attends to skipped rows: `all` later rows (the paper's training), or only rows of the same `image`,
    which makes dropping them after prefill exact."""
    num_unpooled: int = 0
    """Retained tokens in front that the first summary leaves out, as Chain-of-Sight does its 16 global ones."""

    def __post_init__(self) -> None:
        require_numbers(self, "skip.", num_skipped=0, num_unpooled=0)
        require(self.selector in SELECTORS, f"skip.selector: unknown {self.selector!r}")
        require(self.visibility in ("image", "all"), f"skip.visibility: unknown {self.visibility!r}")
        require(
            self.num_unpooled < self.num_retained,
            f"skip.num_unpooled must leave some of the {self.num_retained} retained tokens, got {self.num_unpooled}",
        )
        is_fixed = self.selector == "first" or not self.num_unpooled
        require(is_fixed, "skip.num_unpooled needs skip.selector first, which alone says what stands in front")


@dataclass(frozen=True)
class TextConfig:
    """A Llama-type decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU."""

    vocab_size: int = 1024
    hidden_size: int = 256
    intermediate_size: int = 1024
    num_layers: int = 6
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = True
    qkv_bias: bool = False
    """Biases of query, key and value, as Qwen2 has them."""
    max_positions: int = 0
    """Rows that the model was made for, or that its window of attention holds; 0: nothing is said."""

    def __post_init__(self) -> None:
        require_numbers(self, "text.", max_positions=0)
        require(self.num_heads % self.num_kv_heads == 0, "text.num_kv_heads must divide text.num_heads")
        require(self.head_dim % 2 == 0, "text.head_dim must be even (RoPE)")


@dataclass(frozen=True)
class TilesConfig:
    """Pictures are seen as a thumbnail and in tiles, each as large as the encoder's input."""

    sizes: tuple[tuple[int, int], ...] = ()
    """Heights and widths of the mosaics of tiles that a picture is fitted into, in pixels (LLaVA-NeXT). Thumbnail and
    mosaic are one run of rows: padding is left out, and a learned embedding ends each line of patches."""
    longest_edge: int = 0
    """Or else: the side in pixels that a picture is scaled to before it is cut (SmolVLM). Each tile is a run of rows of
    its own, the thumbnail the last."""
    max_tiles: int = 0
    """A mosaic with more tokens than so many tiles have is shrunk to as many (LLaVA-OneVision); 0: none is."""
    among_others: bool = True
    """Whether pictures are cut where there are several in a conversation; or else only their thumbnails are seen."""

    def __post_init__(self) -> None:
        require(bool(self.sizes) != bool(self.longest_edge), "tiles: either sizes or longest_edge")
        sides = [side for size in self.sizes for side in size]
        require(all(side > 0 for side in (*sides, self.longest_edge or 1)), "tiles: sides must be positive")
        require(self.max_tiles >= 0, f"tiles.max_tiles must be at least 0, got {self.max_tiles}")

    @property
    def is_joined(self) -> bool:
        """Whether thumbnail and tiles of a picture are one run of rows."""
        return bool(self.sizes)


@dataclass(frozen=True)
class ResamplerConfig:
    """Learned queries look at windows of patches, scale by scale (Chain-of-Sight).

    Tokens are coarse before fine; of one scale, windows in raster order; of one window, its queries in order.
    """

    windows: tuple[int, ...] = (32, 4, 2)
    """Side in patches of a window of each scale; the windows of a scale cover the grid."""
    queries: tuple[int, ...] = (16, 4, 4)
    """Queries, and so tokens, of a window of each scale."""
    num_heads: int = 16
    mlp_ratio: int = 4
    """Hidden width of the MLPs, in widths of the encoder."""

    def __post_init__(self) -> None:
        require_numbers(self, "resampler.")
        require(bool(self.windows), "resampler.windows must name at least one scale")
        require(
            len(self.queries) == len(self.windows),
            f"resampler.queries needs a number for each of {len(self.windows)} scales, got {len(self.queries)}",
        )
        order = sorted(self.windows, reverse=True)
        require(list(self.windows) == order, "resampler.windows must stand coarse before fine")

    def num_windows(self, grid: int) -> tuple[int, ...]:
        """Of each scale, where `grid` patches stand along one side."""
        return tuple((grid // window) ** 2 for window in self.windows)

    def token_counts(self, grid: int) -> tuple[int, ...]:
        """Of each scale."""
        return tuple(count * each for count, each in zip(self.num_windows(grid), self.queries, strict=True))


@dataclass(frozen=True)
class ModelConfig:
    """One vision-language model."""

    vision: VisionConfig
    text: TextConfig
    skip: SkipConfig | None = None
    tiles: TilesConfig | None = None
    """None: a picture is seen once."""
    projector: ProjectorKind = "mlp"
    """`linear` is one matrix without a bias; `resampler` makes tokens of its own, not one of each patch."""
    resampler: ResamplerConfig | None = None
    """Of projector resampler alone. It normalises what it reads, so vision.feature_norm has nothing to add."""
    pixel_shuffle: int = 1
    """Side of the squares of patches that the projector takes as one token (SmolVLM)."""
    projector_size: int = 256
    """Hidden width of the projector."""
    projector_convs: int = 0
    """Residual 3x3 convolutions over the grid of patches between the projector's two linear layers, so that a patch
    knows its neighbours before patches are selected and merged (Honeybee, arXiv 2312.06742). 0: LLaVA's MLP."""
    projector_norm: bool = True
    """Normalise every projected patch, so that visual rows are as large as text rows and layers can change them."""
    projector_position: bool = True
    """Add a learned row and column embedding to every projected patch, so that a token that is moved or merged
    still knows where it came from."""
    projector_trained: bool = True
    """False where it holds fresh weights, so that the decoder cannot make sense of pictures yet."""
    skip_trained: bool = True
    """False where a model that was trained without skipping is made to skip."""

    def __post_init__(self) -> None:
        require(self.projector_size >= 1, f"projector_size must be at least 1, got {self.projector_size}")
        require(self.projector_convs >= 0, f"projector_convs must be at least 0, got {self.projector_convs}")
        side = self.pixel_shuffle
        require(side >= 1 and self.vision.grid % side == 0, f"pixel_shuffle must divide {self.vision.grid}, got {side}")
        mlp_alone = self.projector == "mlp" and side == 1
        require(
            mlp_alone or not (self.projector_convs or self.projector_position),
            "projector_convs and projector_position need projector mlp, and pixel_shuffle 1",
        )
        is_resampled = self.projector == "resampler"
        require(
            is_resampled == (self.resampler is not None), "projector resampler and a table resampler need each other"
        )
        if self.resampler is not None:
            self._check_resampler(self.resampler)
        tiles = self.tiles
        require(tiles is None or not tiles.is_joined or self.pixel_shuffle == 1, "tiles.sizes need pixel_shuffle 1")
        whole = all(length % self.vision.image_size == 0 for size in (tiles.sizes if tiles else ()) for length in size)
        require(whole, f"tiles.sizes must be multiples of vision.image_size {self.vision.image_size}")
        if self.skip is not None:
            self._check_skip(self.skip)

    def _check_resampler(self, resampler: ResamplerConfig) -> None:
        grid, width = self.vision.grid, self.vision.hidden_size
        whole = all(grid % window == 0 for window in resampler.windows)
        require(whole, f"resampler.windows must divide {grid}, the patches along one side")
        require(width % resampler.num_heads == 0, f"resampler.num_heads must divide vision.hidden_size {width}")
        require(not self.projector_norm, "projector_norm: a resampler has a norm of its own; set it to false")
        require(self.pixel_shuffle == 1, "pixel_shuffle: a resampler takes patches one by one; set it to 1")
        require(self.tiles is None, "tiles: a resampler sees a picture once; leave them out")

    def _check_skip(self, skip: SkipConfig) -> None:
        # Of tiles, only the thumbnail is there for sure.
        rest = self.num_tokens - skip.num_retained
        require(rest >= 0, f"skip.num_retained must be at most {self.num_tokens} (the tokens of one view)")
        joined = self.tiles is not None and self.tiles.is_joined
        if skip.selector == "first":
            parts = self.leading_parts
            require(bool(parts), "skip.selector first needs tiles that are joined to a thumbnail, or a resampler")
            counts = " or ".join(map(str, parts))
            require(skip.num_retained in parts, f"skip.selector first retains {counts} tokens, not {skip.num_retained}")
        if not joined:
            require(skip.num_skipped <= rest, f"skip.num_skipped must be at most {rest} (what is not retained)")
        require(
            self.vision.has_cls or skip.selector != "cls_attention",
            "skip.selector cls_attention needs an encoder with a CLS token; received_attention does not",
        )
        require(
            self.resampler is None or skip.selector not in RANKED,
            f"skip.selector {skip.selector} ranks patches, and a resampler's tokens are none; first does not",
        )

    @property
    def leading_parts(self) -> tuple[int, ...]:
        """How many tokens the selector `first` can retain: the thumbnail's, or the first scales of a resampler."""
        if self.resampler is not None:
            return tuple(accumulate(self.resampler.token_counts(self.vision.grid)))
        return (self.num_tokens,) if self.tiles is not None and self.tiles.is_joined else ()

    def skip_of(self, num_retained: int, num_skipped: int) -> SkipConfig:
        """The setting with so many tokens: as it was trained, or as the paper trains where it was not."""
        if self.skip is not None:
            return replace(self.skip, num_retained=num_retained, num_skipped=num_skipped)
        selector: Selector = "cls_attention" if self.vision.has_cls else "received_attention"
        if num_retained in self.leading_parts or self.resampler is not None:
            selector = "first"
        # Of a resampler, the first summary leaves the coarsest scale out, unless nothing else is retained.
        coarsest = self.leading_parts[0] if self.resampler is not None else 0
        return SkipConfig(num_retained, num_skipped, selector, "all", coarsest if coarsest < num_retained else 0)

    @property
    def num_tokens(self) -> int:
        """Visual tokens of one view in the plain model."""
        if self.resampler is not None:
            return sum(self.resampler.token_counts(self.vision.grid))
        return self.vision.num_patches // self.pixel_shuffle**2

    @property
    def projector_input(self) -> int:
        """Channels of what the projector makes one token of."""
        return self.vision.feature_size * self.pixel_shuffle**2

    @property
    def num_retained(self) -> int:
        return self.num_tokens if self.skip is None else self.skip.num_retained

    @property
    def num_skipped(self) -> int:
        return 0 if self.skip is None else self.skip.num_skipped

    def with_skip(self, skip: SkipConfig | None) -> ModelConfig:
        """The same model with another setting, which a plain one was not trained for."""
        return replace(self, skip=skip, skip_trained=skip is None or (self.skip is not None and self.skip_trained))

    def as_trained(self) -> ModelConfig:
        """After training, in which its projector and its skip setting always take part."""
        return replace(self, projector_trained=True, skip_trained=True)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @staticmethod
    def from_json(text: str) -> ModelConfig:
        """Raises ConfigError for text that is no such config, an unknown key or a value out of range."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"not JSON: {error}") from None
        return from_mapping(ModelConfig, data)


def from_mapping(cls: type[ConfigType], data: Any, where: str = "") -> ConfigType:
    """Builds the dataclass `cls` from plain JSON or TOML values.

    Raises ConfigError for anything but a mapping, an unknown or missing key, or a value of the wrong type.
    """
    require(isinstance(data, Mapping), f"{where or 'config'}: expected a table, got {type(data).__name__}")
    hints = get_type_hints(cls)
    known = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(known))
    close = difflib.get_close_matches(unknown[0], known, 1) if unknown else []
    require(
        not unknown,
        f"{where or 'config'}: unknown key {', '.join(map(repr, unknown))}; known: {', '.join(sorted(known))}"
        f"{f'; did you mean {close[0]}?' if close else ''}",
    )
    needed = (name for name, field in known.items() if field.default is MISSING and field.default_factory is MISSING)
    missing = [name for name in needed if name not in data]
    require(not missing, f"{where or 'config'}: missing key {', '.join(map(repr, missing))}")
    values = {key: _convert(hints[key], value, f"{where}.{key}" if where else key) for key, value in data.items()}
    return cls(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    options: tuple[Any, ...] = getattr(hint, "__args__", ())
    if type(None) in options:
        if value is None:
            return None
        hint = next(option for option in options if option is not type(None))
        options = getattr(hint, "__args__", ())
    if hasattr(hint, "__dataclass_fields__"):
        return from_mapping(hint, value, where)
    origin = getattr(hint, "__origin__", None)
    if origin is Literal:
        require(value in options, f"{where}: expected one of {', '.join(map(repr, options))}, got {value!r}")
        return value
    if origin is tuple:
        require(isinstance(value, list | tuple), f"{where}: expected a list, got {value!r}")
        item_hints = [options[0]] * len(value) if options[-1] is Ellipsis else list(options)
        require(len(item_hints) == len(value), f"{where}: expected {len(item_hints)} values, got {len(value)}")
        return tuple(_convert(item, each, where) for item, each in zip(item_hints, value, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    require(type(value) is hint, f"{where}: expected {getattr(hint, '__name__', hint)}, got {value!r}")
    return value

"""A new vision-language model from a vision tower and a text decoder; what joins them is to be trained.

The projector is LLaVA's, two linear layers: normal weights of 1/sqrt(inputs), those of the second times the root mean
square of the decoder's embedding, so that visual rows begin as large as text rows; biases are 0. A summary layer
begins as the mean of its group. Embeddings of tokens that the chat needs and the decoder lacks begin as the mean of
those it has.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer
from torch import Tensor, nn

from skipvision.checkpoint import CheckpointError, first_misfit, save_checkpoint
from skipvision.config import ModelConfig, SkipConfig, TextConfig
from skipvision.decoder import Decoder
from skipvision.model import SkipVisionModel
from skipvision.presets import Setting
from skipvision.projector import Projector
from skipvision.published import load_decoder, load_tower
from skipvision.summary import SummaryPool
from skipvision.tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS, special_ids

_TOKENIZER, _TEMPLATE = "tokenizer.json", "chat_template.jinja"
_CHECKPOINT_FILES = {"config.json", "model.safetensors", _TOKENIZER, _TEMPLATE, "processing.json"}
_CHUNK = 4096
"""Rows of an embedding that are looked at in fp32 at a time."""

Split = Setting | tuple[int, int]
"""A setting of the paper, or retained and skipped tokens of a picture."""


class AssembleError(ValueError):
    """Parts that make no model; nothing was written."""


def assemble(
    vision: Path,
    text: Path,
    output: Path,
    *,
    skip: Split | None = None,
    projector_size: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    progress: Callable[[str, float], None] = lambda _what, _share: None,
) -> ModelConfig:
    """Writes the checkpoint `output`, and returns its config.

    `vision` is the folder of a CLIP or SigLIP vision model, `text` that of a causal language model; either may be that
    of a known model, whose part is taken. `projector_size` is the decoder's width where it is None. Weights that are
    stored in `dtype` are mapped from their files and copied to the new one; the others are converted once.

    Raises AssembleError, or CheckpointError or ConfigError for a part that cannot be read.
    """
    check_output(output, overwrite=overwrite)
    progress("reading the vision tower", 0.0)
    vision_config, tower = load_tower(vision, dtype)
    progress("reading the decoder", 0.1)
    text_config, decoder = load_decoder(text, dtype)
    _check_decoder(text_config, decoder, text)
    tokenizer = load_tokenizer(text)
    template = chat_template(tokenizer)
    rows = add_tokens(tokenizer, decoder, text_config.vocab_size)
    config = ModelConfig(
        vision=vision_config,
        text=replace(text_config, vocab_size=rows),
        projector_size=projector_size or text_config.hidden_size,
        projector_norm=False,
        projector_position=False,
        projector_trained=False,
    )
    config = replace(config, skip=_skip(config, skip))
    with torch.device("meta"):
        model = SkipVisionModel(config)
    _fill(model.vision, tower, vision)
    _fill(model.decoder, decoder | {"head.weight": decoder.get("head.weight", decoder["embed.weight"])}, text)
    if config.text.tie_embeddings:
        model.decoder.head.weight = model.decoder.embed.weight
    model.projector = fresh_projector(config, decoder["embed.weight"], seed)
    if model.summary is not None:
        model.summary = SummaryPool(config.text.hidden_size, of_mean=True)
    progress("writing the checkpoint", 0.3)
    save_checkpoint(model, output, {_TOKENIZER: tokenizer.to_str(pretty=True), _TEMPLATE: template}, dtype)
    progress("done", 1.0)
    return config


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raises AssembleError where a checkpoint cannot go to `output`."""
    if output.exists() and not output.is_dir():
        raise AssembleError(f"{output} is a file; choose another folder")
    if output.exists() and not overwrite:
        raise AssembleError(f"{output} exists; allow overwriting it (--overwrite), or choose another folder")
    if output.exists() and not {path.name for path in output.iterdir()} <= _CHECKPOINT_FILES:
        raise AssembleError(f"{output} holds more than a checkpoint, all of which would go; choose another folder")


def _skip(config: ModelConfig, asked: Split | None) -> SkipConfig | None:
    if asked is None:
        return None
    if isinstance(asked, Setting):
        return asked.skip_config(config)
    return SkipConfig(*asked, selector="cls_attention" if config.vision.has_cls else "received_attention")


def _check_decoder(config: TextConfig, tensors: dict[str, Tensor], directory: Path) -> None:
    """Raises CheckpointError for weights that do not fit, before they are given more rows."""
    with torch.device("meta"):
        decoder = Decoder(config)
    tied = {"head.weight": tensors["embed.weight"]} if config.tie_embeddings and "embed.weight" in tensors else {}
    _fill(decoder, tensors | tied, directory)


def _fill(part: nn.Module, tensors: dict[str, Tensor], directory: Path) -> None:
    try:
        part.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{directory}: the weights do not fit config.json: {first_misfit(error)}") from None


def fresh_projector(config: ModelConfig, embedding: Tensor, seed: int) -> Projector:
    """As the head of this file says; `embedding` [vocab, D] says how large text rows are."""
    projector, generator = Projector(config), torch.Generator().manual_seed(seed)
    starts = range(0, len(embedding), _CHUNK)
    power = [float(embedding[start : start + _CHUNK].float().square().sum()) for start in starts]
    size = math.sqrt(sum(power) / embedding.numel())
    with torch.no_grad():
        for layer, scale in ((projector.fc1, 1.0), (projector.fc2, size)):
            layer.weight.normal_(0.0, scale * layer.in_features**-0.5, generator=generator)
            layer.bias.zero_()
    return projector


def load_tokenizer(directory: Path) -> Tokenizer:
    """The decoder's. Raises AssembleError where there is none that can be read."""
    path = directory / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AssembleError(
            f"{directory}: tokenizer.json is missing; save the tokenizer with transformers, as a fast one"
        ) from None
    except Exception as error:  # the tokenizers library raises plain Exception
        raise AssembleError(f"{path}: unreadable ({str(error).splitlines()[0]})") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def chat_template(tokenizer: Tokenizer) -> str:
    """Our own, behind what the decoder's tokenizer puts in front of a text, such as `<s>`."""
    bare, whole = (tokenizer.encode("a", add_special_tokens=each).ids for each in (False, True))
    start = next((place for place in range(len(whole)) if whole[place : place + len(bare)] == bare), 0)
    said = "".join(tokenizer.id_to_token(number) or "" for number in whole[:start])
    if tokenizer.encode(said, add_special_tokens=False).ids != whole[:start]:
        return CHAT_TEMPLATE
    return f"{{{{ {json.dumps(said, ensure_ascii=False)} }}}}{CHAT_TEMPLATE}" if said else CHAT_TEMPLATE


def add_tokens(tokenizer: Tokenizer, decoder: dict[str, Tensor], vocab_size: int) -> int:
    """Gives `tokenizer` the tokens of our chat that it lacks, and `decoder` a row for each, in embedding and head.

    They take rows that the decoder has over, or else new ones. Returns how many rows there are then. Raises
    AssembleError for a tokenizer that knows more tokens than the decoder.
    """
    known = set(tokenizer.get_vocab().values())
    if max(known) >= vocab_size:
        raise AssembleError(f"the tokenizer knows {max(known) + 1} tokens, and the decoder {vocab_size}")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    fresh = sorted(set(special_ids(tokenizer).values()) - known)
    num_rows = max([vocab_size, *(number + 1 for number in fresh)])
    for name in ("embed.weight", "head.weight"):
        if name in decoder:
            decoder[name] = _with_rows(decoder[name], num_rows - vocab_size, fresh, sorted(known))
    return num_rows


def _with_rows(weight: Tensor, more: int, fresh: list[int], known: list[int]) -> Tensor:
    """[V, D] with `more` rows, and the mean of the `known` ones in each that is `fresh`."""
    total = torch.zeros(weight.shape[1])
    for start in range(0, len(known), _CHUNK):
        total += weight[known[start : start + _CHUNK]].float().sum(0)
    grown = torch.cat([weight, weight.new_zeros(more, weight.shape[1])])
    grown[fresh] = (total / len(known)).to(weight.dtype)
    return grown

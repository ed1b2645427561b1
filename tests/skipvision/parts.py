"""Tiny vision towers and text decoders, as transformers saves them with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tests.skipvision import zoo
from tests.skipvision.zoo import transformers

SIDE, PATCHES, VOCABULARY = 28, 16, 300
TOWERS = ("clip alone", "clip with its text half", "siglip alone", "siglip with its text half")
DECODERS = ("llama", "mistral", "qwen2, tied")
_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
_TEXT_HALF = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_DECODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def save_tower(kind: str, folder: Path) -> Any:
    """Their vision model, whose output has hidden states."""
    library = transformers()
    name = "CLIP" if kind.startswith("clip") else "Siglip"
    vision = getattr(library, f"{name}VisionConfig")(**_TOWER, image_size=SIDE, patch_size=7)
    if kind.endswith("alone"):
        model = getattr(library, f"{name}VisionModel")(vision)
    else:
        ids = {"vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
        text = getattr(library, f"{name}TextConfig")(**_TEXT_HALF, **ids)
        config = getattr(library, f"{name}Config")(vision_config=vision, text_config=text)
        model = getattr(library, f"{name}Model")(config)
    draw(model, seed=1)
    model.save_pretrained(folder)
    return model if kind.endswith("alone") else model.vision_model


def save_decoder(kind: str, folder: Path, *, more_rows: int = 0) -> Any:
    """Their causal language model, with `more_rows` than its tokenizer, which lies beside it, has tokens."""
    library, name = transformers(), kind.partition(",")[0]
    tokenizer = base_tokenizer()
    common = _DECODER | {"vocab_size": tokenizer.get_vocab_size() + more_rows}
    if name == "llama":
        model = library.LlamaForCausalLM(library.LlamaConfig(**common, rope_theta=5e5, rms_norm_eps=1e-5))
    elif name == "mistral":
        model = library.MistralForCausalLM(library.MistralConfig(**common, sliding_window=None, head_dim=8))
    else:
        model = library.Qwen2ForCausalLM(library.Qwen2Config(**common, rope_theta=1e6, tie_word_embeddings=True))
    draw(model, seed=2)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return model


def save_known(folder: Path) -> Any:
    """A LLaVA-1.5 with a tokenizer that has some of our tokens."""
    model = zoo.make(zoo.KINDS[0])
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "<pad>", "<image>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return model


def draw(model: Any, seed: int) -> None:
    """Norms around 1, so that one which is lost shows; the rest so large that no output is nearly constant."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else parameter + 0.2 * noise)
    model.eval()


def base_tokenizer() -> Tokenizer:
    """As base models have it: bytes, a start that is put in front of every text, an end."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["what is this? a red ball", "how many cats are there? three"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    return tokenizer

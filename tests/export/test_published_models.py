"""A published model, from the folder that transformers writes to the answer that a bundle of it gives."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from svcli_engines.generate import Conversation, Piece
from svcli_engines.onnx_engine import OnnxEngine
from svcli_engines.processor import Processor
from svcli_engines.sampling import Sampling
from svcli_export.bundle import export_bundle
from svcli_export.chat import Message
from svcli_export.manifest import load_manifest
from tests.export.published import GRID, PINPOINTS, PUBLISHED, Published, save_published, their_messages
from tests.optional import missing

TOKENS = 12
KINDS = ("llava", "llava_next-vicuna", "llava_next-mistral", "llava_next-llama3", "llava_onevision", "smolvlm")


def gradient(width: int, height: int, seed: int) -> Image.Image:
    """Large shapes and no noise, so that one grey level of rounding is one grey level."""
    picture = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    colour = [(200, 30, 40), (20, 160, 220), (240, 200, 10)][seed % 3]
    picture.paste(colour, (width // 5, height // 4, width // 2, height // 2))
    return picture


@dataclass(frozen=True)
class Case:
    """A model of transformers and the folder that it wrote."""

    published: Published
    folder: Path
    model: Any
    processor: Any

    def answer(self, messages: Sequence[Message], pictures: Sequence[Image.Image]) -> list[int]:
        """Greedy ids of transformers."""
        given = self.processor.apply_chat_template(
            their_messages(messages, pictures),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            made = self.model.generate(**given, do_sample=False, max_new_tokens=TOKENS)
        ids: list[int] = made[0, given["input_ids"].shape[1] :].tolist()
        return ids


def their_model(published: Published, image_id: int, vocabulary: int) -> Any:
    transformers: Any = import_module("transformers")

    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "vocab_size": vocabulary, "max_position_embeddings": 8192}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 7}
    kind, torch_seed = published.model_type, 3
    torch.manual_seed(torch_seed)
    if kind == "smolvlm":
        tower = transformers.models.smolvlm.SmolVLMVisionConfig(**vision)
        parts = {"vision_config": tower, "text_config": transformers.LlamaConfig(**text)}
        config = transformers.SmolVLMConfig(**parts, image_token_id=image_id, scale_factor=1, pad_token_id=0)
        model = transformers.SmolVLMForConditionalGeneration(config)
    elif kind == "llava_onevision":
        tower = transformers.SiglipVisionConfig(**vision, vision_use_head=False)
        parts = {"vision_config": tower, "text_config": transformers.Qwen2Config(**text)}
        sizes = [list(size) for size in GRID]
        config = transformers.LlavaOnevisionConfig(
            **parts, image_token_index=image_id, image_grid_pinpoints=sizes, vision_aspect_ratio="anyres_max_2"
        )
        model = transformers.LlavaOnevisionForConditionalGeneration(config)
    else:
        tower = transformers.CLIPVisionConfig(**vision)
        is_mistral = published.template == "mistral"
        decoder = (
            transformers.MistralConfig(**text, sliding_window=None) if is_mistral else transformers.LlamaConfig(**text)
        )
        parts = {"vision_config": tower, "text_config": decoder, "image_token_index": image_id}
        if kind == "llava":
            model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**parts, image_seq_length=16))
        else:
            sizes = [list(size) for size in PINPOINTS]
            config = transformers.LlavaNextConfig(**parts, image_grid_pinpoints=sizes)
            model = transformers.LlavaNextForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else parameter + 0.2 * noise)
    return model.eval()


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    if find_spec("transformers") is None:
        missing("transformers")
    published = PUBLISHED[request.param]
    folder = tmp_path_factory.mktemp("published") / "model"
    processor = save_published(published, folder)
    image_id = json.loads((folder / "config.json").read_text())["image_token_index"]
    model = their_model(published, image_id, len(processor.tokenizer))
    model.generation_config.eos_token_id = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    model.save_pretrained(folder)
    return Case(published, folder, model, processor)


def chat(bundle: Path) -> Conversation:
    manifest = load_manifest(bundle)
    return Conversation(OnnxEngine(bundle, manifest), Processor(bundle, manifest))


def ids_of(conversation: Conversation, question: str, pictures: Sequence[Image.Image]) -> list[int]:
    for event in conversation.ask(question, pictures, Sampling(max_new_tokens=TOKENS)):
        assert not isinstance(event, Piece) or isinstance(event.text, str)
    return list(conversation.messages[-1].ids or ())


def test_the_bundle_answers_as_transformers_does(case: Case, tmp_path: Path) -> None:
    manifest = export_bundle(case.folder, tmp_path / "bundle", precision="fp32", max_images=2, max_context=2048)
    assert manifest.config.skip is None
    assert manifest.chat.published is not None
    assert manifest.check.agreement == 1
    stops = set(manifest.chat.stop_ids)
    for number, (width, height) in enumerate(((60, 50), (200, 31), (28, 28))):
        picture = gradient(width, height, number)
        question = ["What is shown in this image?", "How many cats?", "Why is <image> blue?\n\nTell me."][number]
        asked = [Message("user", question, images=1)]
        wanted = case.answer(asked, [picture]) if "<image>" not in question else None
        got = ids_of(chat(tmp_path / "bundle"), question, [picture])
        assert got
        if wanted is not None:
            assert got == [token for token in wanted if token not in stops]
    two = [gradient(60, 50, 1), gradient(40, 90, 2)]
    wanted = case.answer([Message("user", "What differs?", images=2)], two)
    assert ids_of(chat(tmp_path / "bundle"), "What differs?", two) == [token for token in wanted if token not in stops]


def test_a_second_question_goes_on_behind_the_cache(case: Case, tmp_path: Path) -> None:
    export_bundle(case.folder, tmp_path / "bundle", precision="fp32", max_context=2048)
    conversation = chat(tmp_path / "bundle")
    ids_of(conversation, "What is shown?", [gradient(60, 50, 0)])
    *_, stats = conversation.ask("And what else?", sampling=Sampling(max_new_tokens=3))
    assert not isinstance(stats, Piece)
    assert stats.num_shared_rows > 0
    # The same as one prompt: nothing is lost, doubled or spelt otherwise on the way.
    messages = conversation.messages[:3]
    whole = Conversation(conversation._engine, conversation._processor)
    *_, again = whole.answer(messages, [gradient(60, 50, 0)], Sampling(max_new_tokens=3))
    assert not isinstance(again, Piece)
    assert whole.messages[-1].ids == conversation.messages[-1].ids


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_skipping_is_put_on_top(case: Case, tmp_path: Path, precision: Any) -> None:
    manifest = export_bundle(case.folder, tmp_path / "bundle", precision=precision, skip=(6, 5), max_context=2048)
    skip = manifest.config.skip
    assert skip is not None
    assert skip.selector == ("cls_attention" if manifest.config.vision.has_cls else "received_attention")
    assert not manifest.config.skip_trained
    plain = export_bundle(case.folder, tmp_path / "plain", precision=precision, skip="off", max_context=2048)
    assert manifest.contract.capacity < plain.contract.capacity
    conversation = chat(tmp_path / "bundle")
    *_, stats = conversation.ask("What is shown?", [gradient(60, 50, 0)], Sampling(max_new_tokens=3))
    assert not isinstance(stats, Piece)
    assert stats.visual_tokens_kept < stats.visual_tokens_full
    assert stats.kv_rows < stats.kv_rows_full

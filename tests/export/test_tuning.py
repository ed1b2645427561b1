"""Any model becomes a base, and what was trained is a checkpoint that is exported and chats as the base did."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from skipvision.assemble import assemble
from skipvision.checkpoint import load_checkpoint, save_checkpoint
from skipvision.config import ConfigError, SkipConfig
from skipvision.layout import BatchLayout, TokenLayout, picture_spans
from skipvision.tiles import cut_picture
from skipvision.training.base import Base
from skipvision.training.conversation import Turn
from skipvision.training.speaker import IGNORE
from skipvision.training.tune_recipe import SourceRecipe, TuneData, TuneRecipe
from svcli_engines.generate import Conversation, Piece
from svcli_engines.onnx_engine import OnnxEngine
from svcli_engines.processor import Processor
from svcli_engines.sampling import Sampling
from svcli_export.bundle import export_bundle
from svcli_export.manifest import Manifest, load_manifest
from svcli_export.published_files import ProcessingError
from svcli_export.source import SourceError, read_source
from svcli_export.tuning import read_base, read_speaker
from tests.export.published import PUBLISHED, save_published
from tests.export.test_published_models import KINDS, gradient, their_model
from tests.export.tiny import SKIP, drawn, resampler_config, tiny_checkpoint
from tests.optional import missing
from tests.skipvision.parts import save_decoder, save_tower

QUESTIONS = ("What is shown in this image?", "How many cats?")
ANSWERS = ("A red ball lies on the grass.", "There are three, and a dog.")
TURNS = [
    Turn("user", QUESTIONS[0], 1),
    Turn("assistant", ANSWERS[0]),
    Turn("user", QUESTIONS[1]),
    Turn("assistant", ANSWERS[1]),
]
CONTEXT = 1024


def recipe(folder: Path, **options: Any) -> TuneRecipe:
    return TuneRecipe(str(folder), TuneData((SourceRecipe("never read"),)), **options)


def base_of(folder: Path, **options: Any) -> Base:
    return read_base(folder, recipe(folder, **options))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Of published models, each made once."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            if find_spec("transformers") is None:
                missing("transformers")
            path = tmp_path_factory.mktemp("published") / name
            processor = save_published(PUBLISHED[name], path)
            image_id = json.loads((path / "config.json").read_text())["image_token_index"]
            eos = json.loads((path / "generation_config.json").read_text())["eos_token_id"]
            model = their_model(PUBLISHED[name], image_id, len(processor.tokenizer))
            model.generation_config.eos_token_id = eos
            model.save_pretrained(path)
            made[name] = path
        return made[name]

    return folder


def answers(bundle: Path, picture: Image.Image) -> list[tuple[str, str]]:
    """To both questions, one after the other; each with why it ended."""
    manifest = load_manifest(bundle)
    conversation = Conversation(OnnxEngine(bundle, manifest), Processor(bundle, manifest))
    found: list[tuple[str, str]] = []
    for number, question in enumerate(QUESTIONS):
        *_, stats = conversation.ask(question, [picture] if number == 0 else [], Sampling(max_new_tokens=40))
        assert not isinstance(stats, Piece)
        found.append((conversation.messages[-1].content.strip(), stats.stop_reason))
    return found


def overfit(base: Base, turns: Sequence[Turn], picture: Image.Image, *, enough: float = 0.02) -> int:
    """Trains all of the model on one conversation; the steps that it took."""
    model, speaker = base.model, base.speaker
    cut = cut_picture(model.config, picture.height, picture.width, is_alone=True)
    pixels = torch.from_numpy(speaker.views(picture, model.config, True))
    spoken = speaker.speak(turns, [cut])
    layout = TokenLayout.of(spoken.ids, speaker.image_id, model.config, picture_spans(model.config, cut))
    batch = BatchLayout.of([layout], len(spoken.ids))
    source = torch.from_numpy(batch.source[0, : batch.num_kept])
    rows = source < len(spoken.ids)  # the others are visual
    labels = torch.tensor(spoken.labels)[source[rows]]
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    for step in range(300):
        visual = model.encode_picture(pixels, cut).flatten(0, 1)[None]
        logits = model(torch.tensor([spoken.ids]), visual, batch)[0]
        loss = F.cross_entropy(logits[rows], labels, ignore_index=IGNORE)
        if loss < enough:
            return step
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    raise AssertionError(f"loss {float(loss):.3f}")


def save(base: Base, folder: Path) -> Path:
    save_checkpoint(base.model, folder, base.speaker.files())
    return folder


def contents(bundle: Path) -> dict[str, bytes]:
    """All but the manifest."""
    return {path.name: path.read_bytes() for path in bundle.iterdir() if path.name != "manifest.json"}


def told(manifest: Manifest) -> dict[str, Any]:
    """All but what the check measured."""
    return manifest.model_dump(exclude={"check"})


@pytest.mark.parametrize("name", KINDS)
def test_without_training_the_checkpoint_is_exported_as_the_base(
    folders: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    checkpoint = save(base_of(folders(name)), tmp_path / "checkpoint")
    export_bundle(folders(name), tmp_path / "before", precision="fp32", max_context=CONTEXT, default_variants=False)
    export_bundle(checkpoint, tmp_path / "after", precision="fp32", max_context=CONTEXT, default_variants=False)
    assert contents(tmp_path / "after") == contents(tmp_path / "before")
    assert told(load_manifest(tmp_path / "after")) == told(load_manifest(tmp_path / "before"))


@pytest.mark.parametrize("name", KINDS)
def test_what_was_learned_is_what_the_exported_model_says(
    folders: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    """To both questions, the second behind the cache of the first, with skipped rows evicted in between."""
    picture = gradient(60, 50, 1)
    selector: Any = "received_attention" if name in ("llava_onevision", "smolvlm") else "cls_attention"
    base = base_of(folders(name), skip=SkipConfig(6, 5, selector))
    assert not base.model.config.skip_trained
    overfit(base, TURNS, picture)
    base.model.config = base.model.config.as_trained()
    manifest = export_bundle(
        save(base, tmp_path / "checkpoint"), tmp_path / "bundle", precision="fp32", max_context=CONTEXT
    )
    assert manifest.config == base.model.config
    assert manifest.config.skip_trained
    assert answers(tmp_path / "bundle", picture) == [(ANSWERS[0], "end"), (ANSWERS[1], "end")]


def test_a_model_of_our_own_goes_on_learning(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "base")
    picture, base = gradient(60, 50, 1), base_of(checkpoint)
    assert base.model.config.skip == SKIP
    overfit(base, TURNS, picture)
    export_bundle(save(base, tmp_path / "after"), tmp_path / "bundle", precision="fp32", max_context=CONTEXT)
    assert answers(tmp_path / "bundle", picture) == [(ANSWERS[0], "end"), (ANSWERS[1], "end")]
    assert {path.name for path in (tmp_path / "after").iterdir()} == {path.name for path in checkpoint.iterdir()}


def test_parts_that_were_joined_are_a_base_whose_projector_is_to_be_trained(tmp_path: Path) -> None:
    save_tower("clip alone", tmp_path / "tower")
    save_decoder("llama", tmp_path / "decoder")
    config = assemble(tmp_path / "tower", tmp_path / "decoder", tmp_path / "joined", skip=(4, 6))
    base = base_of(tmp_path / "joined")
    assert base.model.config == config
    assert not config.projector_trained
    assert config.as_trained().projector_trained
    picture = gradient(60, 50, 1)
    before = base.speaker.speak(TURNS, [cut_picture(config, 50, 60, is_alone=True)])
    assert before.labels.count(read_source(tmp_path / "joined").chat.stop_ids[0]) == 2
    overfit(base, TURNS, picture, enough=1.0)


def test_a_resampler_comes_through(tmp_path: Path) -> None:
    tokens = tiny_checkpoint(tmp_path / "tokens")
    files = {name: (tokens / name).read_text() for name in ("tokenizer.json", "chat_template.jinja")}
    save_checkpoint(drawn(resampler_config()), tmp_path / "base", files)
    base = base_of(tmp_path / "base", skip=SkipConfig(11, 9, "first", num_unpooled=3))
    overfit(base, TURNS, gradient(60, 50, 1), enough=1.0)
    again = load_checkpoint(save(base, tmp_path / "after"))
    assert again.config == base.model.config
    for name, tensor in base.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("name", ["llava_next-mistral", "llava_onevision", "smolvlm"])
@pytest.mark.parametrize("asked", [{}, {"skip": SkipConfig(6, 5, "uniform")}, {"preset": "off"}], ids=str)
def test_a_speaker_is_read_without_the_weights(
    folders: Callable[[str], Path], tmp_path: Path, name: str, asked: dict[str, Any]
) -> None:
    base = base_of(folders(name), **asked)
    shutil.copytree(folders(name), tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"")
    speaker, config = read_speaker(tmp_path / "cut", recipe(tmp_path / "cut", **asked))
    assert config == base.model.config
    assert speaker == base.speaker


def test_of_a_checkpoint_and_a_bundle_too(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint")
    export_bundle(checkpoint, tmp_path / "bundle", precision="fp16", max_context=96)
    for folder, weights in ((checkpoint, "model.safetensors"), (tmp_path / "bundle", "weights.safetensors")):
        base = base_of(folder)
        (folder / weights).write_bytes(b"")
        assert read_speaker(folder, recipe(folder)) == (base.speaker, base.model.config)


@pytest.mark.parametrize("kind", ["checkpoint", "fp32 bundle", "fp16 bundle", "published", "published in bf16"])
def test_weights_are_fp32_and_the_bases_stay_as_they_are(
    folders: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    folder = tiny_checkpoint(tmp_path / "base")
    if kind.startswith("published"):
        folder = tmp_path / "published"
        shutil.copytree(folders("llava"), folder)
        if kind.endswith("bf16"):
            weights = load_file(folder / "model.safetensors")
            halved = {name: tensor.bfloat16() for name, tensor in weights.items()}
            save_file(halved, folder / "model.safetensors", {"format": "pt"})
    elif kind.endswith("bundle"):
        export_bundle(folder, tmp_path / "bundle", precision=kind[:4], max_context=96)  # type: ignore[arg-type]
        folder = tmp_path / "bundle"
    before = contents(folder)
    base, reference = base_of(folder), read_source(folder).model
    state = reference.state_dict()
    for name, tensor in base.model.state_dict().items():
        assert torch.equal(tensor, state[name].float()), name
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    mapped = [line.split()[0].split("-") for line in maps if line.endswith(".safetensors")]
    for name, parameter in base.model.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.requires_grad
        assert parameter.is_contiguous(), name
        assert not any(int(low, 16) <= parameter.data_ptr() < int(high, 16) for low, high in mapped), name
    tied = base.model.config.text.tie_embeddings
    assert (base.model.decoder.head.weight is base.model.decoder.embed.weight) == tied
    with torch.no_grad():
        for parameter in base.model.parameters():
            parameter.zero_()
    assert contents(folder) == before


def test_an_identity_is_of_the_weights_and_not_of_the_place(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "base")
    shutil.copytree(folder, tmp_path / "copy")
    first = base_of(folder).identity
    assert base_of(tmp_path / "copy", skip=replace(SKIP, num_skipped=2)).identity == first
    weights = load_file(tmp_path / "copy" / "model.safetensors")
    weights["decoder.layers.1.ffn.up.weight"][3, 5] += 1e-3
    save_file(weights, tmp_path / "copy" / "model.safetensors")
    assert base_of(tmp_path / "copy").identity != first
    config = json.loads((folder / "config.json").read_text())
    config["text"]["rope_theta"] = 5e5
    (folder / "config.json").write_text(json.dumps(config))
    assert base_of(folder).identity != first


def test_progress_goes_up_to_the_end(folders: Callable[[str], Path]) -> None:
    told: list[float] = []
    folder = folders("llava")
    read_base(folder, recipe(folder), lambda _what, share: told.append(share))
    assert told == sorted(told)
    assert told[-1] == 1


def test_a_plain_model_gets_a_summary_layer_and_a_preset_must_fit(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tmp_path / "plain", None)
    assert base_of(folder).model.summary is None
    base = base_of(folder, skip=SKIP)
    assert base.model.summary is not None
    assert all(parameter.requires_grad for parameter in base.model.summary.parameters())
    assert base_of(tiny_checkpoint(tmp_path / "skipping"), preset="off").model.summary is None
    with pytest.raises(ConfigError, match="SV-LLaVA splits 576 visual tokens, and this model has 16"):
        base_of(folder, preset="sv-llava-100")
    with pytest.raises(ConfigError, match=r"^preset: unknown 'sv-100'; known: off, sv-llava-100, "):
        base_of(folder, preset="sv-100")
    with pytest.raises(ConfigError, match="at most 16"):
        base_of(folders("llava"), skip=SkipConfig(17, 0))


@pytest.mark.parametrize(
    "read", [base_of, lambda folder: read_speaker(folder, recipe(folder))], ids=["base", "speaker"]
)
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_rounded_weights_are_no_base(tmp_path: Path, precision: Any, read: Callable[[Path], Any]) -> None:
    export_bundle(tiny_checkpoint(tmp_path / "base"), tmp_path / "bundle", precision=precision, max_context=96)
    with pytest.raises(
        SourceError, match=rf"bundle: a bundle of {precision} weights cannot be trained; name the checkp"
    ):
        read(tmp_path / "bundle")


def test_quantised_weights_are_no_base(folders: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(folders("llava"), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=r"model: its weights are quantised and cannot be trained"):
        base_of(tmp_path / "model")


def test_a_base_without_its_tower_says_what_to_do(tmp_path: Path) -> None:
    written = {
        "model_type": "llava_llama",
        "mm_vision_tower": "someone/tower",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": 1024,
        "hidden_size": 64,
        "num_attention_heads": 4,
    }
    (tmp_path / "config.json").write_text(json.dumps(written))
    remedy = r"; export it with --precision fp32 and --vision-tower, and train on that bundle$"
    with pytest.raises(SourceError, match=remedy):
        base_of(tmp_path)
    with pytest.raises(SourceError, match=remedy):
        read_speaker(tmp_path, recipe(tmp_path))


@pytest.fixture
def checkpoint(folders: Callable[[str], Path], tmp_path: Path) -> Path:
    """Of a published model."""
    return save(base_of(folders("smolvlm"), skip=SkipConfig(6, 5, "uniform")), tmp_path / "checkpoint")


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((folder / "processing.json").read_text())
    change(data)
    (folder / "processing.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: (path / "processing.json").write_text("{"), "processing.json: not JSON"),
        (lambda path: edit(path, lambda data: data.update(more=1)), "processing.json: more: Extra inputs"),
        (lambda path: edit(path, lambda data: data.pop("image")), "processing.json: image: Field required"),
        (
            lambda path: edit(path, lambda data: data["image"].update(fit="x")),
            "processing.json: image.fit: Input should",
        ),
        (lambda path: edit(path, lambda data: data["image"].update(image_size=56)), "pictures of another size"),
        (lambda path: (path / "chat_template.jinja").unlink(), "chat_template.jinja: cannot be read"),
        (lambda path: (path / "chat_template.jinja").write_text("{% if %}"), "its chat template is broken"),
        (lambda path: (path / "tokenizer.json").write_text("{}"), "its tokenizer is broken"),
    ],
)
def test_a_damaged_file_beside_the_weights_is_refused_in_a_sentence(
    checkpoint: Path, damage: Callable[[Path], object], words: str
) -> None:
    damage(checkpoint)
    for read in (read_source, base_of):
        with pytest.raises((SourceError, ProcessingError)) as refusal:
            read(checkpoint)
        assert words in str(refusal.value)
        assert "\n" not in str(refusal.value)


def test_a_checkpoint_of_a_published_model_may_be_written_over(checkpoint: Path, tmp_path: Path) -> None:
    save_tower("clip alone", tmp_path / "tower")
    save_decoder("llama", tmp_path / "decoder")
    assemble(tmp_path / "tower", tmp_path / "decoder", checkpoint, overwrite=True)
    assert not (checkpoint / "processing.json").exists()

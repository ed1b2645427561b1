"""What the folder of a published model says is read, or refused in one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from skipvision.config import TilesConfig
from svcli_export.chat import ChatTokenizer, Message
from svcli_export.manifest import ChatFormat
from svcli_export.pixels import to_views
from svcli_export.processing import read_processing
from svcli_export.published_files import ProcessingError
from tests.export.published import PUBLISHED, TEMPLATES, save_published, sentencepiece, their_pictures
from tests.optional import missing

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[str], Path]:
    if find_spec("transformers") is None:
        missing("transformers")

    def save(name: str) -> Path:
        save_published(PUBLISHED[name], tmp_path)
        return tmp_path

    return save


def change(path: Path, part: str = "", **values: Any) -> None:
    """Sets keys of a JSON file, or of the table `part` in it; None takes one away."""
    data = json.loads(path.read_text()) if path.exists() else {}
    table = data[part] if part else data
    for name, value in values.items():
        table.pop(name, None) if value is None else table.update({name: value})
    path.write_text(json.dumps(data))


def old_style(folder: Path) -> Path:
    """As LLaVA-1.5 was published first: one file a matter, sides as plain numbers, tokens beside the tokenizer."""
    tokenizer = sentencepiece("legacy", special=())
    tokenizer.save(str(folder / "tokenizer.json"))
    change(folder / "preprocessor_config.json", image_processor_type="CLIPFeatureExtractor", size=28, crop_size=28)
    change(folder / "preprocessor_config.json", resample=3, image_mean=list(CLIP_MEAN), image_std=list(CLIP_STD))
    change(folder / "special_tokens_map.json", bos_token={"content": "<s>"}, eos_token="</s>", pad_token="<pad>")
    change(folder / "added_tokens.json", **{"<image>": 460, "<pad>": 461})
    change(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer", add_bos_token=True)
    change(folder / "tokenizer_config.json", additional_special_tokens=["<image>"], unk_token="<unk>")
    change(folder / "chat_template.json", chat_template=TEMPLATES["llava"])
    number = tokenizer.get_vocab_size()
    change(folder / "config.json", model_type="llava", image_token_index=number, text_config={"eos_token_id": 2})
    return folder


def test_everything_is_told(saved: Callable[[str], Path]) -> None:
    found = read_processing(saved("llava"), PUBLISHED["llava"].config)
    assert found.image.model_dump() == {
        "image_size": 28,
        "mean": CLIP_MEAN,
        "std": CLIP_STD,
        "fit": "crop",
        "resample": "bicubic",
        "transparency": "dropped",
    }
    assert found.config.vision.image_mean == CLIP_MEAN
    assert found.chat.template == TEMPLATES["llava"]
    assert found.chat.stop_ids == (2, 5)
    assert found.chat.published is not None
    assert found.chat.published.image_token == "<image>"
    assert not found.chat.published.tags
    assert ChatFormat.model_validate_json(found.chat.model_dump_json()) == found.chat


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_folder_is_read_as_transformers_reads_it(saved: Callable[[str], Path], name: str) -> None:
    """Not as the processor that wrote it."""
    folder = saved(name)
    found = read_processing(folder, PUBLISHED[name].config)
    tokenizer = import_module("transformers").AutoTokenizer.from_pretrained(folder)
    chat = ChatTokenizer(found.tokenizer, found.chat.template, found.chat.published)
    text = "USER: <image>\nWhat is it? </s> \U0001f600 <row_1_col_1>"
    assert chat.tokenizer.encode(text).ids == tokenizer(text)["input_ids"]
    assert found.chat.published is not None
    assert found.chat.published.variables == tokenizer.special_tokens_map
    kind = PUBLISHED[name].model_type
    pictures = their_pictures("clip" if kind == "llava" else kind).from_pretrained(folder)
    picture = Image.linear_gradient("L").resize((90, 50)).convert("RGB")
    views = to_views(picture, found.image, found.config).pixels
    np.testing.assert_allclose(
        views, np.array(pictures(picture)["pixel_values"]).reshape(views.shape), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    ("name", "named"),
    [("llava", "LlamaTokenizer"), ("llava_onevision", "Qwen2Tokenizer"), ("smolvlm", "GPT2Tokenizer")],
)
def test_what_their_tokenizer_classes_make_of_it_is_the_same(
    saved: Callable[[str], Path], name: str, named: str
) -> None:
    """Some of their classes build a tokenizer anew, of the vocabulary alone."""
    folder = saved(name)
    change(folder / "tokenizer_config.json", tokenizer_class=named)
    tokenizer = import_module("transformers").AutoTokenizer.from_pretrained(folder)
    found = read_processing(folder, PUBLISHED[name].config)
    chat = ChatTokenizer(found.tokenizer, found.chat.template, found.chat.published)
    for text in ["USER: <image>\nWhat is it?  Two\t \n\n spaces, 1999", "e\u0301 \u4f60\u597d \U0001f600"]:
        assert chat.tokenizer.encode(text).ids == tokenizer(text)["input_ids"]


def test_a_folder_of_old_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    if find_spec("transformers") is None:
        missing("transformers")
    found = read_processing(old_style(tmp_path), PUBLISHED["llava"].config)
    assert found.image.fit == "crop"
    assert found.chat.stop_ids == (2,)
    tokenizer = import_module("transformers").AutoTokenizer.from_pretrained(tmp_path)
    chat = ChatTokenizer(found.tokenizer, found.chat.template, found.chat.published)
    for text in ["USER: <image>\nWhat is it?", "<pad>x <s></s>"]:
        assert chat.tokenizer.encode(text).ids == tokenizer(text)["input_ids"]
    assert found.chat.published is not None
    assert found.chat.published.variables == tokenizer.special_tokens_map
    assert chat.encode([Message("user", "Why?", 1)]).count(found.chat.image_id) == 1


def test_the_processors_tiles_are_the_models(saved: Callable[[str], Path]) -> None:
    published, folder = PUBLISHED["smolvlm"], saved("smolvlm")
    change(folder / "processor_config.json", "image_processor", size={"longest_edge": 56})
    assert read_processing(folder, published.config).config.tiles == TilesConfig(longest_edge=56)
    unknown = replace(published.config, tiles=None)
    assert read_processing(folder, unknown).config.tiles == TilesConfig(longest_edge=56)


TEMPLATE_FILES: dict[str, Any] = {
    "processor_config.json": {"chat_template": "first"},
    "chat_template.json": {"chat_template": "second"},
    "chat_template.jinja": "third",
    "tokenizer_config.json": {
        "chat_template": [{"name": "rag", "template": "x"}, {"name": "default", "template": "4"}]
    },
}


def test_templates_are_looked_for_where_processors_look(tmp_path: Path) -> None:
    folder = old_style(tmp_path)
    found = []
    for name, content in TEMPLATE_FILES.items():
        if isinstance(content, str):
            (folder / name).write_text(content)
        else:
            change(folder / name, **content)
    for name in TEMPLATE_FILES:
        found.append(read_processing(folder, PUBLISHED["llava"].config).chat.template)
        if name.endswith("jinja"):
            (folder / name).unlink()
        else:
            change(folder / name, chat_template=None)
    assert found == ["first", "second", "third", "4"]


PICTURES = "preprocessor_config.json"
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no image token": ("config.json", {"image_token_index": None}, "names no image_token_id"),
    "another image token": ("config.json", {"image_token_index": 5}, "is not the id 5 that config.json"),
    "an unwritten image token": ("processor_config.json", {"image_token": "<img>"}, "writes <img> for a picture"),
    "an unknown class": (PICTURES, {"image_processor_type": "ViTImageProcessor"}, "unknown image processor ViTImage"),
    "no class": (PICTURES, {"image_processor_type": None}, "unknown image processor None; known: CLIPImageProcessor"),
    "no resizing": (PICTURES, {"do_resize": False}, "do_resize: False is not computed here, only True"),
    "no scaling": (PICTURES, {"do_rescale": False}, "do_rescale: False is not"),
    "another scale": (PICTURES, {"rescale_factor": 1 / 127.5}, "rescale_factor: "),
    "no normalising": (PICTURES, {"do_normalize": False}, "do_normalize: False is not"),
    "no cropping": (PICTURES, {"do_center_crop": False}, "do_center_crop: without it pictures are not square"),
    "another size": (PICTURES, {"size": {"shortest_edge": 32}}, "is not the encoder's 28"),
    "another crop": (PICTURES, {"crop_size": 24}, "crop_size: {'height': 24, 'width': 24} is not the encoder's 28"),
    "a strange size": (PICTURES, {"size": "large"}, "size: expected sides, got 'large'"),
    "one mean": (PICTURES, {"image_mean": 0.5}, "image_mean: expected three numbers, got 0.5"),
    "a strange filter": (PICTURES, {"resample": 9}, "resample: 9 is none of Pillow's filters"),
    "no template": ("chat_template.json", {"chat_template": None}, "has no chat template; add one as"),
    "a broken template": ("chat_template.json", {"chat_template": "{% if %}"}, "its chat template is broken"),
    "no default template": ("chat_template.json", {"chat_template": {"rag": ""}}, "has no chat template"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_computed_is_refused(tmp_path: Path, what: str) -> None:
    folder = old_style(tmp_path)
    file, values, sentence = REFUSED[what]
    change(folder / file, **values)
    with pytest.raises(ProcessingError) as raised:
        read_processing(folder, PUBLISHED["llava"].config)
    assert sentence in str(raised.value)
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)


JOINED = "image_grid_pinpoints"
UNFIT: dict[str, tuple[str, dict[str, Any], TilesConfig | None, str]] = {
    "other sizes": (
        "llava_next-vicuna",
        {JOINED: [[28, 28]]},
        TilesConfig(((28, 56),)),
        "are not those of config.json",
    ),
    "a model without tiles": ("llava_next-vicuna", {JOINED: None}, None, "config.json names no image_grid_pinpoints"),
    "tiles for nobody": ("llava", {}, TilesConfig(((28, 56),)), "cuts no tiles, and its model wants some"),
    "no splitting": ("smolvlm", {"do_image_splitting": False}, None, "do_image_splitting: False is not computed here"),
    "other tiles": ("smolvlm", {"max_image_size": {"longest_edge": 14}}, None, "is not the encoder's 28"),
    "4k": ("smolvlm", {"size": {"longest_edge": 5000}}, None, "only a longest_edge of at most 4096"),
    "no edge": ("smolvlm", {"size": {"height": 28, "width": 28}}, None, "only a longest_edge of at most 4096"),
}


@pytest.mark.parametrize("what", UNFIT)
def test_what_does_not_fit_the_model_is_refused(saved: Callable[[str], Path], what: str) -> None:
    name, values, tiles, sentence = UNFIT[what]
    folder = saved(name)
    change(folder / "processor_config.json", "image_processor", **values)
    with pytest.raises(ProcessingError) as raised:
        read_processing(folder, replace(PUBLISHED[name].config, tiles=tiles))
    assert sentence in str(raised.value)


def test_a_view_of_another_length_is_refused(saved: Callable[[str], Path]) -> None:
    folder = saved("smolvlm")
    change(folder / "processor_config.json", image_seq_len=64)
    with pytest.raises(ProcessingError, match="image_seq_len 64 is not the 16 tokens"):
        read_processing(folder, PUBLISHED["smolvlm"].config)


def test_a_folder_without_tokenizer_json_is_told_the_way_out(tmp_path: Path) -> None:
    folder = old_style(tmp_path)
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(ProcessingError, match=r"has no tokenizer.json; write one with transformers: AutoTokenizer"):
        read_processing(folder, PUBLISHED["llava"].config)


@pytest.mark.parametrize("file", ["tokenizer.json", "config.json", PICTURES, "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_a_broken_file_is_named(tmp_path: Path, file: str, content: bytes) -> None:
    folder = old_style(tmp_path)
    (folder / file).write_bytes(content)
    with pytest.raises(ProcessingError, match=file):
        read_processing(folder, PUBLISHED["llava"].config)


def test_nothing_that_says_how_pictures_are_made_is_said_so(tmp_path: Path) -> None:
    folder = old_style(tmp_path)
    (folder / PICTURES).unlink()
    with pytest.raises(ProcessingError, match=r"neither preprocessor_config.json nor processor_config.json says"):
        read_processing(folder, PUBLISHED["llava"].config)


def test_a_model_that_never_ends_is_refused(tmp_path: Path) -> None:
    folder = old_style(tmp_path)
    change(folder / "config.json", text_config=None)
    change(folder / "special_tokens_map.json", eos_token=None)
    with pytest.raises(ProcessingError, match="no file names an eos token"):
        read_processing(folder, PUBLISHED["llava"].config)


def test_every_id_that_ends_a_text_is_a_stop(tmp_path: Path) -> None:
    folder = old_style(tmp_path)
    change(folder / "generation_config.json", eos_token_id=[7, 9])
    change(folder / "config.json", eos_token_id=11)
    assert read_processing(folder, PUBLISHED["llava"].config).chat.stop_ids == (2, 7, 9, 11)


def test_a_tokenizer_that_ends_every_text_is_refused(tmp_path: Path) -> None:
    folder = old_style(tmp_path)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    single = tokenizer["post_processor"]["single"]
    tokenizer["post_processor"]["single"] = [*single[1:], single[0]]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ProcessingError, match="is not supported: it puts a token behind every text"):
        read_processing(folder, PUBLISHED["llava"].config)


def test_neither_torch_nor_transformers_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from svcli_export.chat import ChatTokenizer, Message\n"
        "from svcli_export.processing import read_processing\n"
        "from tests.export.published import PUBLISHED\n"
        "found = read_processing(Path(sys.argv[1]), PUBLISHED['llava'].config)\n"
        "ChatTokenizer(found.tokenizer, found.chat.template, found.chat.published).encode([Message('user', 'Hi')])\n"
        "print({'torch', 'transformers', 'onnx'} & sys.modules.keys())"
    )
    command = [sys.executable, "-c", code, str(old_style(tmp_path))]
    root = Path(__file__).parents[2]
    path = ":".join(map(str, (root, root / "export")))
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": path}, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("set()\n", "")

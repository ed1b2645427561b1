"""Checkpoints: they come back as they were, and what is wrong with one is said in a sentence."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from skipvision import folders
from skipvision.checkpoint import CheckpointError, NoCheckpointError, load_checkpoint, save_checkpoint
from skipvision.config import SkipConfig
from skipvision.folders import write_directory
from skipvision.model import SkipVisionModel
from tests.skipvision.tiny import PROMPTS, SKIPS, batch_of, tiny_config, tiny_model

WEIGHTS = "model.safetensors"
FILES = {"tokenizer.json": "{}", "chat_template.jinja": "template", "processing.json": "more"}


def saved(folder: Path, model: SkipVisionModel | None = None) -> Path:
    path = folder / "checkpoint"
    save_checkpoint(model or tiny_model(dtype=torch.float32), path, FILES)
    return path


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("skip", SKIPS.values(), ids=SKIPS.keys())
def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path, skip: SkipConfig | None, tied: bool) -> None:
    model = tiny_model(tiny_config(skip, tied=tied), dtype=torch.float32)
    again = load_checkpoint(saved(tmp_path, model))
    assert again.config == model.config
    assert not again.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    made = batch_of(model, [PROMPTS["image-between"]])
    with torch.no_grad():
        ours, theirs = (each(made.input_ids, made.visual, made.batch) for each in (model, again))
    assert torch.equal(ours, theirs)


def test_a_tied_head_is_stored_once_and_stays_tied(tmp_path: Path) -> None:
    model = tiny_model(tiny_config(tied=True), dtype=torch.float32)
    path = saved(tmp_path, model)
    assert "decoder.head.weight" not in load_file(path / WEIGHTS)
    again = load_checkpoint(path)
    assert again.decoder.head.weight is again.decoder.embed.weight
    assert "decoder.head.weight" in load_file(saved(tmp_path / "untied") / WEIGHTS)


def test_files_lie_beside_the_weights(tmp_path: Path) -> None:
    path = saved(tmp_path)
    assert {each.name for each in path.iterdir()} == {"config.json", WEIGHTS, *FILES}
    for name, text in FILES.items():
        assert (path / name).read_text(encoding="utf-8") == text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_weights_are_stored_and_loaded_in_the_dtype_that_is_asked_for(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_model(dtype=torch.float32)
    path = tmp_path / "checkpoint"
    save_checkpoint(model, path, FILES, dtype)
    assert {tensor.dtype for tensor in load_file(path / WEIGHTS).values()} == {dtype}
    assert {parameter.dtype for parameter in load_checkpoint(path).parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in load_checkpoint(path, dtype).parameters()} == {dtype}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def remove(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def cut(path: Path) -> None:
    whole = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(whole[: len(whole) // 2])


def empty(path: Path) -> None:
    (path / WEIGHTS).write_bytes(b"")


def reconfigure(table: str, key: str, value: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = json.loads((path / "config.json").read_text(encoding="utf-8"))
        data[table][key] = value
        (path / "config.json").write_text(json.dumps(data), encoding="utf-8")

    return change


def lose_a_tensor(path: Path) -> None:
    tensors = load_file(path / WEIGHTS)
    del tensors["decoder.layers.1.ffn.up.weight"]
    save_file(tensors, path / WEIGHTS)


def add_a_tensor(path: Path) -> None:
    save_file(load_file(path / WEIGHTS) | {"extra": torch.zeros(1)}, path / WEIGHTS)


def break_json(path: Path) -> None:
    (path / "config.json").write_text("{", encoding="utf-8")


def break_text(path: Path) -> None:
    (path / "config.json").write_bytes(b"\xff\xfe")


def make_a_folder_of(name: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        (path / name).unlink()
        (path / name).mkdir()

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("config.json"), r"checkpoint: config\.json is missing$"),
        (remove(WEIGHTS), r"checkpoint: model\.safetensors is missing"),
        (cut, r"model\.safetensors: unreadable"),
        (empty, r"model\.safetensors: unreadable"),
        (make_a_folder_of(WEIGHTS), r"model\.safetensors: unreadable"),
        (make_a_folder_of("config.json"), r"config\.json: unreadable"),
        (break_text, r"config\.json: unreadable"),
        (break_json, r"config\.json: not JSON"),
        (reconfigure("text", "window", 3), r"config\.json: text: unknown key 'window'"),
        (reconfigure("skip", "num_retained", 99), r"config\.json: skip\.num_retained must be at most 16"),
        (reconfigure("text", "hidden_size", 30), "the weights do not fit config.json: size mismatch"),
        (reconfigure("text", "num_layers", 3), "the weights do not fit config.json: Missing key"),
        (reconfigure("text", "num_layers", 1), "the weights do not fit config.json: Unexpected key"),
        (lose_a_tensor, r"the weights do not fit config.json: Missing .*decoder\.layers\.1\.ffn\.up\.weight"),
        (add_a_tensor, r'the weights do not fit config.json: Unexpected .*"extra"'),
    ],
    ids=lambda value: "" if isinstance(value, str) else getattr(value, "__name__", "damage"),
)
def test_a_damaged_checkpoint_is_refused_in_a_sentence(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    path = saved(tmp_path)
    damage(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_where_no_folder_can_be_made_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**asked: Any) -> str:
        raise OSError(errno.EROFS, "Read-only file system", str(asked["dir"] / f"{asked['prefix']}a1b2"))

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(OSError, match="Read-only") as caught:
        write_directory(tmp_path / "new", lambda _folder: None)
    assert caught.value.filename == str(tmp_path / "new")


def test_a_missing_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none: no such checkpoint folder$"):
        load_checkpoint(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NoCheckpointError, match=r"empty: config\.json is missing, so it is no checkpoint$"):
        load_checkpoint(tmp_path / "empty")


def test_saving_again_replaces_everything(tmp_path: Path) -> None:
    path = saved(tmp_path)
    (path / "left-over.txt").touch()
    other = tiny_model(seed=1, dtype=torch.float32)
    saved(tmp_path, other)
    assert not (path / "left-over.txt").exists()
    name = "projector.fc1.weight"
    assert torch.equal(load_checkpoint(path).get_parameter(name), other.get_parameter(name))
    assert list(tmp_path.iterdir()) == [path]


def test_a_failing_write_leaves_the_old_checkpoint_whole(tmp_path: Path) -> None:
    path = saved(tmp_path)
    before = {each.name: each.read_bytes() for each in path.iterdir()}

    def fail(folder: Path) -> None:
        (folder / WEIGHTS).write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_directory(path, fail)
    assert {each.name: each.read_bytes() for each in path.iterdir()} == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_failing_swap_leaves_the_old_checkpoint_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path)
    before = {each.name: each.read_bytes() for each in path.iterdir()}

    def fail(_first: Path, second: Path) -> None:
        raise OSError(errno.EINVAL, "no", str(second))

    monkeypatch.setattr(folders, "_exchange", fail)
    with pytest.raises(OSError, match="no"):
        write_directory(path, lambda folder: (folder / "new").touch())
    assert {each.name: each.read_bytes() for each in path.iterdir()} == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_swap_that_the_system_refuses_says_why(tmp_path: Path) -> None:
    path = saved(tmp_path)
    with pytest.raises(FileNotFoundError, match="checkpoint"):
        folders._exchange(tmp_path / "none", path)
    assert (path / WEIGHTS).exists()


def test_old_and_new_change_places_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the swap touches the folder, and either side of it both are whole."""
    path, exchange = saved(tmp_path), folders._exchange
    swaps = []

    def spy(fresh: Path, old: Path) -> None:
        assert (fresh / "new").exists()
        assert (old / WEIGHTS).exists()
        exchange(fresh, old)
        assert (fresh / WEIGHTS).exists()
        assert (old / "new").exists()
        swaps.append(old)

    monkeypatch.setattr(folders, "_exchange", spy)
    monkeypatch.delattr(os, "replace")
    write_directory(path, lambda folder: (folder / "new").touch())
    assert swaps == [path]
    assert list(tmp_path.iterdir()) == [path]


def test_a_first_checkpoint_makes_its_parents(tmp_path: Path) -> None:
    write_directory(tmp_path / "a" / "b", lambda folder: (folder / "x").touch())
    assert (tmp_path / "a" / "b" / "x").exists()
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o755

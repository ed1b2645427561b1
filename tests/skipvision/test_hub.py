"""What is a folder, what is an id on the hub, and what an index may name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from skipvision.hub import HubId, find_model, shards
from skipvision.hub_errors import HubError, NoModelError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("llava-hf/llava-1.5-7b-hf", HubId("llava-hf/llava-1.5-7b-hf")),
        ("owner/name@v1.0", HubId("owner/name", "v1.0")),
        ("owner/name@refs/pr/3", HubId("owner/name", "refs/pr/3")),
        ("owner/name@a--b", HubId("owner/name", "a--b")),
        *((name, None) for name in ("name", "/owner/name", "./name", "../name", "a/b/c", "a/b/", "~/name", "a/b@", "")),
        *((name, None) for name in ("a--b/c", "a..b/c", "a/b.git", "a/b.git@main", "-a/b", "a/b-", "a/b c", "ä/b")),
        (f"owner/{'n' * 97}", None),
    ],
)
def test_an_id_is_two_names_and_perhaps_a_revision(name: str, found: HubId | None) -> None:
    assert HubId.of(name) == found


def test_an_id_is_printed_as_it_is_written() -> None:
    assert [str(HubId("a/b")), str(HubId("a/b", "v1"))] == ["a/b", "a/b@v1"]


def test_a_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_model(str(tmp_path)) == tmp_path
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_model("owner/name") == Path("owner/name")
    with pytest.raises(NoModelError, match="owner/name/none: no such folder"):
        find_model("owner/name/none")


def test_without_huggingface_hub_the_way_to_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("huggingface_hub", "huggingface_hub.utils", "huggingface_hub.utils.logging"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(NoModelError, match=r'^a/b: no such folder; to get .* pip install "svcli\[torch\]"$'):
        find_model("a/b")


def test_a_folder_needs_neither_torch_nor_huggingface_hub(tmp_path: Path) -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from skipvision.hub import find_model\n"
        f"find_model({str(tmp_path)!r})\n"
        "print(*({'torch', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_an_index_names_files_beside_it(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "a.safetensors"}}))
    assert shards(index) == ["a.safetensors", "b.safetensors"]
    unusable: list[object] = [
        {"weight_map": {"x": "../a.safetensors"}},
        {"weight_map": {"x": 3}},
        {"weight_map": []},
        [],
        3,
    ]
    for given in unusable:
        index.write_text(json.dumps(given))
        with pytest.raises(HubError, match=r"is no safetensors file beside it|unreadable") as refusal:
            shards(index)
        assert "\n" not in str(refusal.value)

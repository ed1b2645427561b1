"""The weight file is what the safetensors package writes, written with one piece in memory."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from svcli_export.weights import Piece, TensorInfo, WeightFile, write_safetensors

Arrays = dict[str, npt.NDArray[Any]]
_SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
_DTYPES = st.sampled_from(["float32", "float16", "int8", "uint8"])


def piece(arrays: Arrays) -> Piece:
    return Piece({name: TensorInfo(each.dtype, each.shape) for name, each in arrays.items()}, lambda: arrays)


@settings(max_examples=60, deadline=None)
@given(
    kinds=st.dictionaries(st.text(st.characters(categories=("L", "N", "P")), min_size=1), st.tuples(_DTYPES, _SHAPES)),
    at_once=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_it_is_byte_for_byte_what_the_package_writes(
    kinds: Mapping[str, tuple[str, tuple[int, ...]]], at_once: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    arrays = {
        name: generator.integers(0, 100, shape).astype(dtype)
        for name, (dtype, shape) in kinds.items()
        if name != "__metadata__"
    }
    names = list(arrays)
    pieces = [
        piece({name: arrays[name] for name in names[first : first + at_once]})
        for first in range(0, len(names), at_once)
    ]
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder, "ours"), Path(folder, "theirs")
        write_safetensors(pieces, ours)
        save_file(arrays, theirs)
        assert ours.read_bytes() == theirs.read_bytes()
        back = load_file(ours)
    assert back.keys() == arrays.keys()
    for name, wanted in arrays.items():
        np.testing.assert_array_equal(back[name], wanted)


def test_a_matrix_that_is_turned_is_written_as_it_reads(tmp_path: Path) -> None:
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3).T
    write_safetensors([piece({"turned": matrix})], tmp_path / "one")
    np.testing.assert_array_equal(load_file(tmp_path / "one")["turned"], matrix)


def test_one_piece_is_alive_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[Any]] = []
    most = 0

    def made(number: int) -> Arrays:
        nonlocal most
        most = max(most, sum(each() is not None for each in alive))
        array = np.full(1000, number, np.float32)
        alive.append(weakref.ref(array))
        return {f"tensor {number}": array}

    infos = [{f"tensor {number}": TensorInfo(np.float32, (1000,))} for number in range(5)]
    pieces = [Piece(info, lambda number=number: made(number)) for number, info in enumerate(infos)]  # type: ignore[misc]
    write_safetensors(pieces, tmp_path / "weights")
    assert len(alive) == 5
    assert most == 0  # none of the earlier ones, whenever one is made


@pytest.mark.parametrize("error", [OSError("the disk is full"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"older")

    def fail() -> Arrays:
        raise error

    good = piece({"a": np.ones(3, np.float32)})
    with pytest.raises(type(error)):
        write_safetensors([good, Piece({"b": TensorInfo(np.float32, (2,))}, fail)], path)
    assert path.read_bytes() == b"older"
    assert [each.name for each in tmp_path.iterdir()] == ["weights"]


def test_a_tensor_that_is_not_what_was_announced_is_our_own_mistake(tmp_path: Path) -> None:
    for wrong in (np.ones(4, np.float32), np.ones(3, np.float16)):
        announced = Piece({"a": TensorInfo(np.float32, (3,))}, lambda wrong=wrong: {"a": wrong})  # type: ignore[misc]
        with pytest.raises(AssertionError, match="a: "):
            write_safetensors([announced], tmp_path / "weights")
    assert list(tmp_path.iterdir()) == []


def test_initializers_point_at_the_bytes(tmp_path: Path) -> None:
    arrays: Arrays = {
        "float": np.arange(6, dtype=np.float32).reshape(2, 3),
        "pairs": np.arange(8, dtype=np.uint8).reshape(2, 4),
    }
    path = tmp_path / "weights.safetensors"
    weights, content = WeightFile.write([piece(arrays)], path), path.read_bytes()
    for name, dims in (("float", [2, 3]), ("pairs", [2, 8])):  # two numbers a byte
        tensor = weights.initializer(name, "other")
        place = {entry.key: entry.value for entry in tensor.external_data}
        start = int(place["offset"])
        assert content[start : start + int(place["length"])] == arrays[name].tobytes()
        assert (tensor.name, list(tensor.dims), place["location"]) == ("other", dims, path.name)
    with safe_open(path, framework="numpy") as file:
        assert set(file.keys()) == set(arrays)

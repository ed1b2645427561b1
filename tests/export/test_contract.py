"""The contract is a value, and what is written about it is true."""

from __future__ import annotations

from pathlib import Path

import pytest

from skipvision.config import ModelConfig, SkipConfig, TextConfig, VisionConfig
from svcli_export.contract import ContractError, build_contract, markdown_table
from tests.export.tiny import NUM_PATCHES, SKIP, resampler_config, tiny_config

README = Path(__file__).parents[2] / "export" / "README.md"
BEGIN, END = "<!-- contract: begin -->\n", "<!-- contract: end -->"


def test_readme_table_is_that_of_the_default_model() -> None:
    config = ModelConfig(VisionConfig(), TextConfig(), SkipConfig())
    table = README.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    assert table == markdown_table(build_contract(config, 1024, 2, "int8"))


def test_capacity_counts_only_what_survives() -> None:
    contract = build_contract(tiny_config(), 100, 3, "fp32")
    assert contract.capacity_full == 100
    assert contract.capacity == 100 - 3 * (NUM_PATCHES - (SKIP.num_retained + 2))
    assert contract.max_positions == contract.capacity + 3 * SKIP.num_skipped
    assert contract.kv_bytes_per_row == 2 * 2 * 2 * 8 * 4  # K and V, layers, KV heads, head size, fp32


def test_decode_reads_a_cache_of_the_reduced_capacity() -> None:
    contract = build_contract(tiny_config(), 100, 3, "fp16")
    past = [tensor for tensor in contract.graph("decode").inputs if tensor.name.startswith("past")]
    assert len(past) == 2 * 2
    assert {tensor.shape for tensor in past} == {("num_sequences", 2, contract.capacity, 8)}
    assert {tensor.dtype for tensor in past} == {"float16"}


def test_plain_model_keeps_everything() -> None:
    contract = build_contract(tiny_config(None), 100, 3, "fp32")
    assert contract.capacity == contract.capacity_full == contract.max_positions == 100
    assert not {"kept_index", "visible_until"} & set(contract.graph("prefill").input_names)


@pytest.mark.parametrize(
    ("skip", "told"),
    [
        (SKIP, True),
        (SkipConfig(4, 0, selector="uniform"), True),
        (SkipConfig(11, 6, selector="first"), False),
        (None, False),
    ],
)
def test_vision_tells_what_was_selected(skip: SkipConfig | None, told: bool) -> None:
    by_place = skip is not None and skip.selector == "first"  # which takes the coarse scales of a resampler
    config = resampler_config(skip) if by_place else tiny_config(skip)
    outputs = build_contract(config, 200, 3, "fp16").graph("vision").outputs
    assert [(tensor.dtype, tensor.shape) for tensor in outputs if tensor.name == "retained"] == (
        [("int64", ("num_images", 4))] if told else []
    )


@pytest.mark.parametrize(("max_context", "max_images"), [(64, 0), (32, 2), (-1, 1)])
def test_impossible_limits_are_refused(max_context: int, max_images: int) -> None:
    with pytest.raises(ContractError, match="max_"):
        build_contract(tiny_config(), max_context, max_images, "fp32")

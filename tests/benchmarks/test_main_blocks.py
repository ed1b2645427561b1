"""What the documents and the figure make of the main table's results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import main_blocks, main_plot
from benchmarks.blocks import NotMeasuredError


def row(title: str, group: str, flops: float, *means: float) -> dict[str, Any]:
    seeds = {
        str(number): {"accuracy": dict.fromkeys(main_blocks.TASKS, each), "same_answers": 0.5 + number / 4}
        for number, each in enumerate(means)
    }
    return {
        **{"title": title, "group": group, "trained": True, "prefill_rows": 115, "cache_rows": 46},
        **{"flops": flops, "seeds": seeds},
    }


def made_up() -> dict[str, Any]:
    rows = {
        "dense": row("dense", "dense", 4e9, 0.70, 0.74),
        "skip-middle": row("middle", "skip", 1e9, 0.665, 0.675),
        "skip-large": row("large", "skip", 2e9, 0.67, 0.69),
        "skip-small": row("small", "skip", 5e8, 0.5, 0.5),
        "pooled": row("pooled", "rival", 9e8, 0.6),
        "middle-kept": row("kept", "ablation", 1e9, 0.6, 0.6),
        "blind": row("blind", "blind", 1e8, 0.2),
    }
    design = {"base_steps": 3000, "steps": 250, "batch_size": 8, "learning_rate": 3e-4}
    design |= {"test_pictures": 400, "questions_per_picture": 6}
    machine = {"machine": {"cpu": "a CPU"}, "versions": {"torch": "2"}, "threads": 1, "date": "2026-01-01"}
    return {**machine, "design": design, "variants": rows}


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    results = made_up()
    monkeypatch.setattr(main_blocks, "result", lambda _name: results)
    return results


def test_the_default_is_the_cheapest_setting_that_is_near_the_best(found: dict[str, Any]) -> None:
    assert main_blocks.chosen(found["variants"]) == "skip-middle"
    found["variants"]["skip-large"] = row("large", "skip", 2e9, 0.69, 0.70)
    assert main_blocks.chosen(found["variants"]) == "skip-large"


def test_a_table_says_means_spread_and_what_follows(found: dict[str, Any]) -> None:
    text = main_blocks.main_table()
    assert text.startswith("![accuracy against FLOPs](../benchmarks/results/main_table.png)\n\n| right answers")
    assert "| dense | 2 |" in text
    assert "72.0 ± 2.8" in text
    assert "| pooled | 1 |" in text
    assert "60.0 ± " not in text.split("| pooled")[1].split("\n")[0]
    assert "**middle** has the fewest FLOPs among those within 1 point of the best" in text
    assert "It is 5.0 points below dense at 25.0 % of its FLOPs." in text
    assert "kept: 50.0 % of answers are word for word" in text
    assert "Times" not in text
    spread = {"median": 0.5, "p10": 0.4, "p90": 0.6, "runs": 3}
    machine = {name: found[name] for name in ("machine", "versions", "threads", "date")}
    found["times"] = {**machine, "step": {"dense": spread}, "first_token": {"dense": spread, "pooled": spread}}
    text = main_blocks.main_table()
    assert "| 100.0 % | 500 ms | 500 ms |" in text
    assert "| 22.5 % |  | 500 ms |" in text


def test_a_table_that_is_not_done_is_not_measured(found: dict[str, Any]) -> None:
    del found["variants"]["skip-small"]
    with pytest.raises(NotMeasuredError, match="not done"):
        main_blocks.main_table()


def test_names_in_the_figure_do_not_overlap() -> None:
    assert main_plot.apart([3.0, 1.0, 1.1, 5.0], 0.5) == [3.0, 1.0, 1.5, 5.0]
    assert main_plot.apart([1.0, 1.0, 1.0], 1.0) == [1.0, 2.0, 3.0]


def test_the_figure_is_drawn_of_whatever_there_is(found: dict[str, Any], tmp_path: Path) -> None:
    main_plot.draw(found, tmp_path / "main_table.png")
    with Image.open(tmp_path / "main_table.png") as image:
        assert image.width > 1500
        assert len(image.convert("RGB").getcolors(2**20) or []) > 20
    assert [path.name for path in tmp_path.iterdir()] == ["main_table.png"]

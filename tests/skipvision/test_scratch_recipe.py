"""Recipes: what is read, and what is refused with the key that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from skipvision.config import ConfigError, SkipConfig
from skipvision.training.recipes import read_scratch_recipe
from skipvision.training.scratch_recipe import DataRecipe, OptimRecipe, ScratchRecipe

ROOT = Path(__file__).parents[2]
MODEL = "[model.vision]\n[model.text]\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_recipe_of_the_bundled_model_can_be_read() -> None:
    recipe = read_scratch_recipe(ROOT / "recipes" / "skipvision-tiny.toml")
    assert recipe.optim.steps > recipe.optim.warmup_steps


def test_what_a_recipe_leaves_out_has_a_default(tmp_path: Path) -> None:
    recipe = read_scratch_recipe(write(tmp_path, MODEL))
    assert (recipe.data, recipe.optim) == (DataRecipe(), OptimRecipe())
    assert recipe == ScratchRecipe(recipe.model)
    assert recipe.model.skip is None


def test_a_recipe_sets_what_it_names(tmp_path: Path) -> None:
    text = (
        "seed = 3\nblind = true\n" + MODEL + "[model.skip]\nnum_retained = 9\n[optim]\nlearning_rate = 1\nsteps = 7\n"
    )
    recipe = read_scratch_recipe(write(tmp_path, text))
    assert (recipe.seed, recipe.blind, recipe.optim.steps, recipe.optim.learning_rate) == (3, True, 7, 1.0)
    assert recipe.model.skip == SkipConfig(num_retained=9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MODEL + "[optim]\nstep = 3\n", "optim: unknown key 'step'; known: .*steps"),
        ("sed = 3\n" + MODEL, "config: unknown key 'sed'"),
        (MODEL + "[model.skip]\nretained = 3\n", "model.skip: unknown key 'retained'"),
        (MODEL + "[optim]\nsteps = 3.5\n", "optim.steps: expected int, got 3.5"),
        (MODEL + "[model.skip]\nselector = 'best'\n", "model.skip.selector: expected one of"),
        (MODEL + "[model.skip]\nnum_retained = 300\n", "skip.num_retained must be at most 256"),
        (
            MODEL + "[model.skip]\nselector = 'received_attention'\n",
            "model.skip.selector: training knows cls_attention, random and uniform$",
        ),
        (
            MODEL + "[model.tiles]\nsizes = [[224, 448]]\n[model.skip]\nselector = 'first'\nnum_retained = 256\n",
            "model.skip.selector: training knows cls_attention, random and uniform$",
        ),
        (MODEL + "[model.tiles]\nsizes = [[224, 448]]\n", "model.tiles: training sees a picture once$"),
        (MODEL + "[model.tiles]\nlongest_edge = 448\n", "model.tiles: training sees a picture once$"),
        (
            "[model]\nprojector = 'linear'\npixel_shuffle = 2\nprojector_position = false\n" + MODEL,
            "model.projector: training needs one token for each patch, so no resampler and pixel_shuffle 1$",
        ),
        ("seed = 3\n", "a recipe has either base, .*, or \\[model\\], .*; this one has neither$"),
        ("[model]\n", "model: missing key 'vision', 'text'$"),
        ("seed = \n", ".*line 1"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_with_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=f"^{path}: {message}"):
        read_scratch_recipe(path)


@pytest.mark.parametrize("selector", ["cls_attention", "random", "uniform"])
def test_selectors_that_training_knows_are_read(tmp_path: Path, selector: str) -> None:
    recipe = read_scratch_recipe(write(tmp_path, MODEL + f"[model.skip]\nselector = '{selector}'\n"))
    assert recipe.model.skip == SkipConfig(selector=selector)  # type: ignore[arg-type]


def test_a_missing_recipe_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: no such recipe$"):
        read_scratch_recipe(tmp_path / "none.toml")


def test_a_recipe_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"recipe\.toml: "):
        read_scratch_recipe(tmp_path / "recipe.toml")
    with pytest.raises(ConfigError, match=str(tmp_path)):
        read_scratch_recipe(tmp_path)


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        ("optim", "steps", 0),
        ("optim", "batch_size", 0),
        ("optim", "text_width", 0),
        ("optim", "warmup_steps", -1),
        ("optim", "learning_rate", -1.0),
        ("optim", "second_turn", 1.5),
        ("optim", "second_turn", -0.5),
        ("optim", "max_grad_norm", 0.0),
        ("optim", "weight_decay", float("inf")),
        ("optim", "patch_loss", float("nan")),
        ("data", "num_scenes", -1),
        ("data", "question_draws", 0),
        ("data", "questions_per_draw", 0),
        ("", "seed", -1),
        ("", "save_every", 0),
        ("", "vocab_size", 260),
    ],
)
def test_numbers_out_of_range_are_named(tmp_path: Path, table: str, key: str, value: float) -> None:
    line = f"{key} = {value}\n"
    text = MODEL + f"[{table}]\n{line}" if table else line + MODEL
    field = f"{table}.{key}" if table else key
    with pytest.raises(ConfigError, match=rf"recipe\.toml: {field} must be"):
        read_scratch_recipe(write(tmp_path, text))

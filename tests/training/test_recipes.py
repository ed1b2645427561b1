"""Recipes by name: files, presets, what is set on the command line, and what is refused with the key that is wrong."""

from __future__ import annotations

import re
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipvision.config import ConfigError, ModelConfig, SkipConfig, TextConfig, VisionConfig
from skipvision.presets import PRESETS as SKIP_PRESETS
from skipvision.training.recipes import PRESETS, as_toml, read_recipe
from skipvision.training.scratch_recipe import OptimRecipe, ScratchRecipe
from skipvision.training.tune_recipe import (
    LogRecipe,
    LoraRecipe,
    SaveRecipe,
    SourceRecipe,
    TuneData,
    TuneOptim,
    TuneRecipe,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
TUNE = "base = 'b'\n[data]\nsources = [{ path = 'a.json' }, { path = 'b.json', weight = 3 }]\n"
B = SourceRecipe("b.json", weight=3.0)
GIVEN = ("base=models/x", 'data.sources=[{path="a.json"}]')


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(TUNE, encoding="utf-8")
    return path


def tune(name: str | Path, *overrides: str) -> TuneRecipe:
    recipe = read_recipe(str(name), overrides)
    assert isinstance(recipe, TuneRecipe)
    return recipe


def test_base_or_model_tells_what_a_recipe_is(file: Path) -> None:
    assert tune(file).data.sources[1] == B
    assert isinstance(read_recipe(str(ROOT / "recipes" / "skipvision-tiny.toml")), ScratchRecipe)
    file.write_text("seed = 1\n")
    with pytest.raises(ConfigError, match=r"recipe\.toml: a recipe has either base, .*; this one has neither$"):
        read_recipe(str(file))
    file.write_text("base = 'x'\n[model.vision]\n[model.text]\n")
    with pytest.raises(ConfigError, match=r"; this one has both$"):
        read_recipe(str(file))


@pytest.mark.parametrize(
    ("override", "place", "value"),
    [
        ("optim.steps=100", "optim.steps", 100),
        (" optim.steps = 100", "optim.steps", 100),
        ("optim.learning_rate=1e-4", "optim.learning_rate", 1e-4),
        ("optim.learning_rate=1", "optim.learning_rate", 1.0),
        ("base=models/x", "base", "models/x"),
        ("base=owner/name@v1.5", "base", "owner/name@v1.5"),
        ("base=a folder", "base", "a folder"),
        ('base="[a]"', "base", "[a]"),
        ("deterministic=true", "deterministic", True),
        ('skip.visibility="image"', "skip", SkipConfig()),
        ("skip={num_retained=5, num_skipped=4}", "skip", SkipConfig(5, 4)),
        ("what=lora", "what", "lora"),
        ("lora.targets=['q']", "lora.targets", ("q",)),
        ("optim.betas.1=0.99", "optim.betas", (0.9, 0.99)),
        (
            "data.sources.0.weight=2",
            "data.sources",
            (SourceRecipe("a.json", weight=2), B),
        ),
        ("data.sources.1=", "data.sources", (SourceRecipe("a.json"),)),
        ("log.wandb=", "log.wandb", ""),
    ],
)
def test_an_override_sets_what_it_names(file: Path, override: str, place: str, value: object) -> None:
    file.write_text(TUNE + "[optim]\nbetas = [0.9, 0.98]\n[log]\nwandb = 'p'\n")
    found: Any = tune(file, override)
    for part in place.split("."):
        found = getattr(found, part)
    assert found == value


def test_later_overrides_win_and_reach_into_what_earlier_ones_brought(file: Path) -> None:
    recipe = tune(file, "data.sources=[{path='c'}]", "data.sources.0.split=test", "seed=1", "seed=2", "optim.steps=")
    assert (recipe.data.sources, recipe.seed, recipe.optim.steps) == ((SourceRecipe("c", split="test"),), 2, 0)


def test_recipes_of_models_from_nothing_are_set_alike() -> None:
    recipe = read_recipe(str(ROOT / "recipes" / "skipvision-tiny.toml"), ["model.skip.num_retained=9", "blind=true"])
    assert isinstance(recipe, ScratchRecipe)
    assert (recipe.blind, recipe.model.skip) == (True, SkipConfig(9, 64))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.step=3", r"optim: unknown key 'step'; known: .*steps.*; did you mean steps\?$"),
        ("optin.steps=3", r"config: unknown key 'optin'; known: .*; did you mean optim\?$"),
        ("data.sources.0.wait=3", r"data\.sources\.?\S*: unknown key 'wait'"),
        ("optim.steps=3.5", "optim.steps: expected int, got 3.5"),
        ("optim.steps=many", "optim.steps: expected int, got 'many'"),
        ("optim.steps=-1", "optim.steps must be finite and at least 0"),
        ("optim.learning_rate=nan", "optim.learning_rate must be finite and positive"),
        ("optim.micro_batch_size=7", "optim.micro_batch_size must divide optim.batch_size 128$"),
        ("what=all", "what: expected one of 'projector', 'full', 'lora', got 'all'"),
        ("base=2026-01-01", "base: expected str, got"),
        ("optim=3", "optim: expected a table"),
        ("data.sources=[]", "data.sources must name at least one source$"),
        ("preset=off", ""),
        ("optim.steps", "^optim.steps: what is set is KEY=VALUE, such as optim.steps=100$"),
        ("=3", "^=3: what is set is KEY=VALUE"),
        ("optim..steps=3", "what is set is KEY=VALUE"),
        ("data.sources.2.weight=3", "^data.sources is a list of 2, counted from 0; there is no '2'$"),
        ("data.sources.-1.weight=3", "there is no '-1'$"),
        ("data.sources.all=3", "there is no 'all'$"),
        ("data.sources.99999999999999=", "there is no '9+'$"),
        ("base.x=3", "^base is a value, and no table that has 'x'$"),
        ("base.x.y=3", "^base is a value, and no table that has 'x'$"),
        ("base=a#b", """^base: 'a#b' is no TOML; a string with such letters is quoted: 'base="..."'$"""),
        ("base=shards/{0..3}.tar", "is no TOML"),
        ("seed=1\nbase=2", "is no TOML"),
        ("base=a\nb", "is no TOML"),
        ("base=" + "[" * 100_000, "is no TOML"),
    ],
)
def test_an_override_that_cannot_work_is_refused_with_its_key(file: Path, override: str, message: str) -> None:
    if not message:
        assert tune(file, override).preset == "off"
        return
    with pytest.raises(ConfigError, match=message):
        read_recipe(str(file), [override])


def test_presets_are_complete_but_for_what_is_the_users() -> None:
    for name, about in PRESETS.items():
        recipe = tune(name, *GIVEN)
        assert (recipe.base, recipe.data.sources) == ("models/x", (SourceRecipe("a.json"),))
        assert recipe.preset == (name if name.startswith("sv-") else "off")
        assert recipe.preset in ("off", *SKIP_PRESETS)
        assert about.endswith(".")
    for missing in ((), GIVEN[:1], GIVEN[1:], (*GIVEN, "data=3"), (*GIVEN, "base=")):
        with pytest.raises(ConfigError, match=r"^llava-sft: a preset leaves the model and the conv"):
            read_recipe("llava-sft", missing)


def test_presets_say_what_the_papers_say() -> None:
    first, dense, lora = (tune(name, *GIVEN) for name in ("llava-stage1", "llava-sft", "llava-lora"))
    assert (first.what, first.optim.learning_rate, first.optim.batch_size) == ("projector", 1e-3, 256)
    assert (dense.what, dense.optim.learning_rate, dense.optim.batch_size) == ("full", 2e-5, 128)
    assert (lora.what, lora.lora.rank, lora.lora.alpha) == ("lora", 128, 256)
    assert (lora.optim.learning_rate, lora.optim.projector_learning_rate) == (2e-4, 2e-5)
    for name in SKIP_PRESETS:
        recipe = tune(name, *GIVEN)
        assert (recipe.what, recipe.optim.learning_rate, recipe.optim.batch_size) == ("full", 1e-5, 64)
        assert recipe.optim.vision_learning_rate == (1e-5 if "cos" in name else 0)
        assert (recipe.optim.weight_decay, recipe.optim.warmup_share, recipe.data.max_length) == (0, 0.03, 2048)
    assert tune("sv-cos-272", *GIVEN).optim.vision_decay == 0.9


def test_a_name_that_is_nothing_lists_the_presets_and_a_file_comes_before_a_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"sv-lava: no such recipe, and no preset; presets: .*sv-llava-100"):
        read_recipe("sv-lava")
    monkeypatch.chdir(tmp_path)
    Path("llava-sft").write_text(TUNE)
    assert tune("llava-sft").base == "b"


def test_a_preset_cannot_be_changed_through_what_was_read() -> None:
    assert tune("llava-sft", *GIVEN, "optim.steps=5").optim.steps == 5
    assert tune("llava-sft", *GIVEN).optim.steps == 0


def test_the_example_recipe_asks_for_a_base_alone() -> None:
    recipe = tune(ROOT / "recipes" / "tune-tiny.toml", "base=somewhere")
    assert [source.path for source in recipe.data.sources] == ["examples/questions.jsonl"]
    with pytest.raises(ConfigError, match="either base"):
        read_recipe(str(ROOT / "recipes" / "tune-tiny.toml"))


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
positive = st.floats(1e-9, 1e9)
counts = st.integers(1, 10**9)
sources = st.lists(
    st.builds(SourceRecipe, text, st.sampled_from(["auto", "json", "datasets", "tar"]), text, text, positive),
    min_size=1,
    max_size=3,
).map(tuple)
skips = st.builds(SkipConfig, counts.map(lambda count: count + 5), counts)
tune_recipes = st.builds(
    TuneRecipe,
    base=text,
    data=st.builds(TuneData, sources, sources | st.just(()), pack=st.booleans()),
    what=st.sampled_from(["projector", "full", "lora"]),
    skip=st.none() | skips,
    optim=st.builds(TuneOptim, learning_rate=positive, betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999))),
    lora=st.builds(LoraRecipe, targets=st.permutations(["q", "down", "up"]).map(tuple)),
    save=st.builds(SaveRecipe, counts, counts),
    log=st.builds(LogRecipe, st.booleans(), st.just("") | text),
    seed=counts,
)
scratch_recipes = st.builds(
    ScratchRecipe,
    model=st.builds(ModelConfig, st.just(VisionConfig()), st.just(TextConfig()), st.none() | st.just(SkipConfig())),
    optim=st.builds(OptimRecipe, learning_rate=positive, steps=counts),
    assets=text,
)


@given(tune_recipes | scratch_recipes)
def test_what_is_printed_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, recipe: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "printed.toml"
    path.write_text(as_toml(recipe), encoding="utf-8")
    assert read_recipe(str(path)) == recipe


def test_every_key_is_printed() -> None:
    def keys(value: Any) -> Any:
        if is_dataclass(value):
            named = {field.name: getattr(value, field.name) for field in fields(value)}
            return {name: keys(each) for name, each in named.items() if each is not None}
        return [keys(each) for each in value] if isinstance(value, tuple) else None

    def printed(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: printed(each) for name, each in value.items()}
        return [printed(each) for each in value] if isinstance(value, list) else None

    for recipe in (tune("sv-cos-272", *GIVEN), read_recipe(str(ROOT / "recipes" / "skipvision-tiny.toml"))):
        assert printed(tomllib.loads(as_toml(recipe))) == keys(recipe)


def test_pictures_of_the_example_questions_are_there() -> None:
    lines = (ROOT / "examples" / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    names = {name for line in lines for name in re.findall(r"[\w-]+\.png", line)}
    assert len(lines) == 12
    assert all((ROOT / "examples" / name).is_file() for name in names)
    assert len(names) == 2

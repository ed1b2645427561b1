"""A text is tokenised as a whole, goes on without a seam, and holds no special token that somebody wrote."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from svcli_export.manifest import PublishedPrompt
from svcli_export.prompt_tokenizer import PromptTokenizer
from svcli_export.template import PublishedTemplate
from tests.export.published import SPACE, qwen2, sentencepiece

STYLES = ("legacy", "first", "always", "never")


def prompts(tokenizer: Tokenizer, *reserved: str, bos: str | None = "<s>") -> PromptTokenizer:
    return PromptTokenizer(tokenizer.to_str(), reserved, bos)


@pytest.mark.parametrize("style", STYLES)
def test_a_text_that_goes_on_has_no_space_in_front(style: str) -> None:
    whole = prompts(sentencepiece(style))
    begun, behind = whole.ids("A red ball"), whole.ids(" lies there", begins=False)
    assert begun + behind == whole.ids("A red ball lies there")
    assert not whole.tokenizer.id_to_token(whole.ids("lies", begins=False)[0]).startswith(SPACE)


@pytest.mark.parametrize("style", STYLES)
def test_what_is_behind_an_added_token_begins_as_in_a_whole_text(style: str) -> None:
    whole = prompts(sentencepiece(style))
    assert whole.ids("A ball") + whole.ids(" lies</s>What is it?", begins=False) == whole.ids(
        "A ball lies</s>What is it?"
    )


@pytest.mark.parametrize("tokenizer", [sentencepiece("first"), sentencepiece("legacy"), qwen2()], ids=lambda _: "")
def test_a_typed_token_is_tokenised_as_text(tokenizer: Tokenizer) -> None:
    whole = prompts(tokenizer)
    ids = whole.plain_ids("an <image>")
    assert tokenizer.token_to_id("<image>") not in ids
    # Not letter by letter: `image` is a word that the tokenizer knows.
    assert len(ids) < len("an <image>") - 3
    assert whole.ids("an <image>", [(0, 10)], begins=False) == ids


def test_a_special_token_that_letters_could_join_to_is_not_joined() -> None:
    vocabulary = {"<": 0, "s": 1, ">": 2, "<s": 3, "<s>": 4, "a": 5}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("<", "s"), ("<s", ">")]))
    tokenizer.add_special_tokens(["<s>"])
    whole = prompts(tokenizer, bos=None)
    assert whole.ids("<s>a<s>", [(3, 7)]) == [4, 5, 0, 1, 2]


@pytest.mark.parametrize("text", ["hi <mark>", "hi <mark> ho"])
def test_a_token_that_takes_spaces_along_may_stand_beside_what_is_written(text: str) -> None:
    tokenizer = sentencepiece("first")
    tokenizer.add_special_tokens([AddedToken("<mark>", lstrip=True, rstrip=True, normalized=False, special=True)])
    written = [(0, 3), (9, len(text))]
    assert prompts(tokenizer).ids(text, written) == tokenizer.encode(text).ids


def test_what_is_reserved_cannot_be_typed_though_the_tokenizer_does_not_call_it_special() -> None:
    tokenizer = sentencepiece("first", special=())
    tokenizer.add_tokens([AddedToken("<image>", normalized=False)])
    image = tokenizer.token_to_id("<image>")
    assert image in prompts(tokenizer).ids("<image>", [(0, 7)])
    assert image not in prompts(tokenizer, "<image>").ids("<image>", [(0, 7)])


def test_letters_that_the_tokenizer_lacks_stay_unknown() -> None:
    tokenizer = Tokenizer(
        models.BPE({"<unk>": 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")], unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.add_special_tokens(["<unk>"])
    assert prompts(tokenizer, bos=None).ids("abzzab", [(0, 6)]) == tokenizer.encode("abzzab").ids == [3, 0, 3]


def test_texts_are_neither_cut_nor_filled_up() -> None:
    tokenizer = sentencepiece("first")
    expected = tokenizer.encode("What is shown in this image?").ids
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    assert prompts(tokenizer).ids("What is shown in this image?") == expected


def test_a_word_boundary_tokenizer_puts_no_space_in_front_either() -> None:
    tokenizer = qwen2()
    data = json.loads(tokenizer.to_str())
    data["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True
    tokenizer = Tokenizer.from_str(json.dumps(data))
    assert isinstance(tokenizer.pre_tokenizer, pre_tokenizers.PreTokenizer)
    whole = prompts(tokenizer, bos=None)
    assert tokenizer.decode(whole.ids("image")) == " image"
    assert tokenizer.decode(whole.ids("image", begins=False)) == "image"


def test_what_a_template_sets_in_an_answer_stays_there() -> None:
    text = "{% generation %}{% set x = 1 %}{% endgeneration %}{{ x is defined }}"
    prompt = PublishedPrompt(variables={}, image_token="<image>", tags=False)
    assert PublishedTemplate(text, prompt).render([]).text == "False"

"""One answer in the making: stop texts, log-probabilities, reasons."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svcli_engines.base import Logits
from svcli_engines.processor import Processor
from svcli_engines.sampling import Sampling, SamplingError
from svcli_engines.turn import Turn
from tests.engines.conftest import Exported

END = 4


def ids_of(processor: Processor, text: str) -> list[int]:
    return processor._chat.encode_text(text)


def logits_of(token: int) -> Logits:
    logits = np.zeros(300, np.float32)
    logits[token] = 1
    return logits


def said(processor: Processor, tokens: Sequence[int], sampling: Sampling) -> tuple[Turn, list[str]]:
    turn = Turn(processor, sampling)
    pieces = []
    for token in tokens:
        pieces.append(turn.take(logits_of(token)).text)
        if turn.stop_reason:
            break
    return turn, pieces


@settings(max_examples=80, deadline=None)
@given(text=st.text("ab ", min_size=1, max_size=12), stops=st.lists(st.text("ab ", min_size=1, max_size=4), max_size=2))
def test_nothing_from_a_stop_text_on_is_said(exported: Exported, text: str, stops: list[str]) -> None:
    processor = exported.processor
    ids = ids_of(processor, text)
    turn, pieces = said(processor, [*ids, END], Sampling(stop=tuple(stops)))
    # The first one to be complete ends it, even if another had begun before.
    grown = [processor.decode(ids[:count]) for count in range(1, len(ids) + 1)]
    spoken = next((each for each in grown if any(stop in each for stop in stops)), text)
    places = [at for stop in stops if (at := spoken.find(stop)) >= 0]
    assert "".join(pieces) == turn.text == spoken[: min(places, default=None)]
    assert turn.stop_reason == ("stop" if places else "end")


def test_an_answer_that_a_stop_text_ended_is_known_by_its_words(exported: Exported) -> None:
    processor = exported.processor
    turn, _ = said(processor, [*ids_of(processor, "a red ball"), END], Sampling(stop=(" ball",)))
    assert (turn.message().content, turn.message().ids) == ("a red", None)
    turn, _ = said(processor, [*ids_of(processor, "a red ball"), END], Sampling())
    assert turn.message().ids == tuple(ids_of(processor, "a red ball"))


def test_tokens_are_told_with_how_likely_they_were(exported: Exported) -> None:
    processor = exported.processor
    turn = Turn(processor, Sampling(logprobs=2, max_new_tokens=2))
    logits = np.random.default_rng(0).normal(size=300).astype(np.float32)
    pieces = [turn.take(logits), turn.take(logits)]
    told = [token for piece in pieces for token in piece.tokens]
    shares = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64))[np.arange(300) != 1].sum()
    shares[processor.image_id] = 0
    shares /= shares.sum()
    best = np.argsort(-shares)[:2]
    assert [token.id for token in told] == [best[0]] * 2
    for token in told:
        assert token.logprob == pytest.approx(np.log(shares[best[0]]), abs=1e-6)
        assert [each for each, _ in token.likeliest] == best.tolist()
        np.testing.assert_allclose([each for _, each in token.likeliest], np.log(shares[best]), atol=1e-6)


def test_an_answer_can_be_kept_from_ending(exported: Exported) -> None:
    turn = Turn(exported.processor, Sampling(min_new_tokens=2))
    for count in (1, 2):
        turn.take(logits_of(END))
        assert (len(turn.ids), turn.stop_reason) == (count, None)
    turn.take(logits_of(END))
    assert (len(turn.ids), turn.stop_reason) == (2, "end")


def test_nothing_is_told_unless_asked_for(exported: Exported) -> None:
    turn = Turn(exported.processor, Sampling())
    assert turn.take(logits_of(9)).tokens == ()


@pytest.mark.parametrize("wrong", [{"stop": ("",)}, {"logprobs": -1}, {"min_new_tokens": 129}])
def test_settings_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(SamplingError):
        Sampling(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_that_was_begun_goes_on_as_if_it_had_not_broken_off(exported: Exported, temperature: float) -> None:
    random = np.random.default_rng(0)
    rows = random.normal(size=(12, exported.processor.config.text.vocab_size)).astype(np.float32)

    def ids(rows: Logits, begin: tuple[int, ...] = ()) -> list[int]:
        turn = Turn(exported.processor, Sampling(temperature=temperature, seed=1, min_new_tokens=12, begin=begin))
        pieces = [turn.take(row) for row in rows]
        told = [token for piece in pieces for token in piece.ids]
        assert told == turn.ids[: len(told)]
        return turn.ids

    whole = ids(rows)
    different = rows.copy()
    different[:5] = rows[::-1][:5]
    assert ids(different)[:5] != whole[:5]
    assert ids(different, tuple(whole[:5])) == whole

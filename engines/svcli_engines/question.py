"""A conversation that ends with a question, made ready for an engine. Knows of none, so any thread may make one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from skipvision.layout import TokenLayout
from svcli_engines.pictures import Picture
from svcli_engines.processor import Processor, Prompt
from svcli_export.chat import Message


@dataclass(frozen=True)
class Unit:
    """What one id of a prompt puts into the KV cache. Equal units behind equal units put in the same."""

    token: int
    picture: str = ""
    """Key of the picture that a placeholder stands for."""
    run: int = 0
    """Which run of that picture's rows."""
    num_rows: int = 1
    """In the cache."""
    num_positions: int = 1


@dataclass(frozen=True)
class Rest:
    """What is left to compute of a prompt."""

    ids: list[int]
    pictures: tuple[Picture, ...]
    layout: TokenLayout


class Question:
    """Messages, their pictures in order, and the units of the prompt, one for each id."""

    def __init__(
        self,
        processor: Processor,
        messages: Sequence[Message],
        images: Sequence[Image.Image] = (),
        known: Sequence[Picture] = (),
    ) -> None:
        """`images` are all pictures of the messages; those among `known`, the very same object, are not read again.

        Raises PromptError for what cannot be asked.
        """
        cuts = processor.cuts(images)
        self.messages = tuple(messages)
        self.prompt: Prompt = processor.prompt(messages, cuts)
        self.pictures = tuple(
            next((each for each in known if each.image is image and each.cut == cut), None)
            or Picture.of(image, cut, processor.views(image, is_alone=len(images) == 1))
            for image, cut in zip(images, cuts, strict=True)
        )
        self._processor = processor
        runs = [(number, run) for number, cut in enumerate(cuts) for run in range(len(processor.spans(cut)))]
        placed = iter(zip(runs, self.prompt.layout.images, strict=True))
        units, self._numbers = [], []
        for token in self.prompt.ids:
            if token != processor.image_id:
                units.append(Unit(token))
                self._numbers.append(-1)
                continue
            (number, run), span = next(placed)
            units.append(Unit(token, self.pictures[number].key, run, span.num_kept, span.length))
            self._numbers.append(number)
        self.units = tuple(units)

    def num_shared(self, cached: Sequence[Unit]) -> int:
        """Leading ids that are in a cache of these units, but for the last, whose logits are asked for.

        A picture is shared as a whole or not at all, since all of its runs have its key.
        """
        count = 0
        for mine, theirs in zip(self.units[:-1], cached, strict=False):
            if mine != theirs:
                break
            count += 1
        return count

    def rest(self, num_known: int) -> Rest:
        """What is behind the first `num_known` ids, alone."""
        ids, numbers = self.prompt.ids[num_known:], [each for each in self._numbers[num_known:] if each >= 0]
        spans = self.prompt.layout.images[len(self.prompt.layout.images) - len(numbers) :]
        pictures = self.pictures[numbers[0] :] if numbers else ()
        return Rest(ids, pictures, self._processor.layout(ids, spans))

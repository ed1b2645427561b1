"""What a model is to say in training: of each conversation the ids of chat, and on each row of an answer the next."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from skipvision.tiles import Cut, cut_picture
from skipvision.tokenizer import CHAT_TEMPLATE, train_tokenizer
from skipvision.training.conversation import BrokenSampleError, Turn
from skipvision.training.speaker import IGNORE, Spoken
from svcli_export.chat import ChatTokenizer, Message
from svcli_export.pixels import to_views
from svcli_export.processing import read_processing
from svcli_export.source import own_chat, own_image
from svcli_export.speaking import ChatSpeaker
from tests.export.published import PUBLISHED, save_published, their_messages
from tests.export.tiny import VOCAB, tiny_config
from tests.optional import missing

TWO_TURNS = [
    Turn("user", "What is it?", 1),
    Turn("assistant", " Two cats.\n"),
    Turn("user", "Why?"),
    Turn("assistant", "A dog"),
]


def own_speaker(template: str = CHAT_TEMPLATE) -> ChatSpeaker:
    tokenizer = train_tokenizer(["what is it? two cats", "why? a dog"], VOCAB).to_str()
    return ChatSpeaker(tokenizer, own_chat(Path("own"), tokenizer, template), own_image(tiny_config().vision))


@pytest.fixture(scope="module")
def speakers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ChatSpeaker]:
    made = {"own": own_speaker()}

    def speaker(name: str) -> ChatSpeaker:
        if name not in made:
            if find_spec("transformers") is None:
                missing("transformers")
            folder = tmp_path_factory.mktemp(name)
            save_published(PUBLISHED[name], folder)
            read = read_processing(folder, PUBLISHED[name].config)
            made[name] = ChatSpeaker(read.tokenizer, read.chat, read.image)
        return made[name]

    return speaker


def cuts_of(name: str, turns: Sequence[Turn]) -> list[Cut]:
    config = tiny_config() if name == "own" else PUBLISHED[name].config
    number = sum(turn.images for turn in turns)
    return [cut_picture(config, 28, 28, number == 1)] * number


def messages_of(turns: Sequence[Turn]) -> list[Message]:
    return [Message(turn.role, turn.content.strip(), turn.images) for turn in turns]


def spelt(speaker: ChatSpeaker, spoken: Spoken) -> tuple[str, str]:
    """All that is fed, and all that is to be said."""
    tokens = ChatTokenizer(speaker.tokenizer, speaker.chat.template, speaker.chat.published).tokenizer
    said = [label for label in spoken.labels if label != IGNORE]
    fed, said_text = (tokens.decode(ids, skip_special_tokens=False) for ids in (spoken.ids, said))
    return fed, said_text


TILES = (
    "".join(
        "".join(f"<fake_token_around_image><row_{row}_col_{column}><image>" for column in range(1, 5)) + "\n"
        for row in range(1, 5)
    )
    + "\n<fake_token_around_image><global-img><image><fake_token_around_image>"
)
SPELT = {
    "own": (
        "<image><user>What is it?<assistant>Two cats.<end><user>Why?<assistant>A dog<end>",
        "Two cats.<end>A dog<end>",
    ),
    "llava": (
        "<s> USER: <image>\nWhat is it? ASSISTANT: Two cats. USER: Why? ASSISTANT: A dog ",
        "Two cats.</s> A dog</s>",
    ),
    "llava_next-vicuna": (
        "<s> USER: <image> \nWhat is it? ASSISTANT: Two cats. USER: Why? ASSISTANT: A dog ",
        "Two cats.</s> A dog</s>",
    ),
    "llava_next-mistral": (
        "<s> [INST] <image>\nWhat is it? [/INST] Two cats.</s>[INST] Why? [/INST] A dog</s>",
        "Two cats.</s> A dog</s>",
    ),
    "llava_next-llama3": (
        (
            "<|begin_of_text|>    <|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is it?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nTwo cats.<|eot_id|>"
            "    <|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nA dog<|eot_id|>"
        ),
        "Two cats.<|eot_id|>A dog<|eot_id|>",
    ),
    "llava_onevision": (
        (
            "<|im_start|>user <image>\n\nWhat is it?<|im_end|><|im_start|>assistant\nTwo cats.<|im_end|>"
            "<|im_start|>user \nWhy?<|im_end|><|im_start|>assistant\nA dog<|im_end|>"
        ),
        "Two cats.<|im_end|>A dog<|im_end|>",
    ),
    "smolvlm": (
        "<|im_start|>User:" + TILES + "What is it?<end_of_utterance>\nAssistant: Two cats.<end_of_utterance>\n"
        "User: Why?<end_of_utterance>\nAssistant: A dog<end_of_utterance>\n",
        " Two cats.<end_of_utterance> A dog<end_of_utterance>",
    ),
}
"""By hand: what is fed, and what is to be said."""


@pytest.mark.parametrize("name", SPELT)
def test_what_is_fed_and_what_is_to_be_said(speakers: Callable[[str], ChatSpeaker], name: str) -> None:
    speaker = speakers(name)
    spoken = speaker.speak(TWO_TURNS, cuts_of(name, TWO_TURNS))
    assert spelt(speaker, spoken) == SPELT[name]
    assert len(spoken.ids) == len(spoken.labels)


@pytest.mark.parametrize("name", SPELT)
def test_a_row_says_the_id_behind_it_and_the_last_of_an_answer_ends_it(
    speakers: Callable[[str], ChatSpeaker], name: str
) -> None:
    speaker = speakers(name)
    spoken = speaker.speak(TWO_TURNS, cuts_of(name, TWO_TURNS))
    stops = {place for place, label in enumerate(spoken.labels) if label in speaker.chat.stop_ids}
    assert len(stops) == 2
    for place, label in enumerate(spoken.labels):
        if label != IGNORE and place not in stops:
            assert spoken.ids[place + 1] == label
    runs = [place for place, label in enumerate(spoken.labels) if label != IGNORE]
    assert {place for place in runs if place + 1 not in runs} == stops


@pytest.mark.parametrize("name", ["own", *PUBLISHED])
def test_the_ids_are_those_that_chat_feeds(speakers: Callable[[str], ChatSpeaker], name: str) -> None:
    """Each prompt to its end as a question is asked, and all of them where the answers were generated."""
    speaker, cuts = speakers(name), cuts_of(name, TWO_TURNS)
    chat = ChatTokenizer(speaker.tokenizer, speaker.chat.template, speaker.chat.published)
    spoken, messages = speaker.speak(TWO_TURNS, cuts), messages_of(TWO_TURNS)
    said: list[tuple[int, ...]] = [()]
    for label in spoken.labels:
        if label in speaker.chat.stop_ids:
            said.append(())
        elif label != IGNORE:
            said[-1] += (label,)
    known = [*messages[:1], Message("assistant", "", ids=said[0]), messages[2], Message("assistant", "", ids=said[1])]
    assert chat.encode(known, cuts) == spoken.ids
    for asked in (known[:1], known[:3]):
        prompt = chat.encode(asked, cuts)
        assert spoken.ids[: len(prompt)] == prompt
        assert spoken.labels[len(prompt) - 1] == spoken.ids[len(prompt)]
        assert spoken.labels[len(prompt) - 2] == IGNORE
    assert [chat.decode(ids).strip() for ids in said[:2]] == ["Two cats.", "A dog"]


DIFFERS = ("llava_next-llama3", "llava_onevision")
"""Their templates ask for an answer without the spaces that they write one down with."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_they_are_those_of_the_familys_own_processor(
    speakers: Callable[[str], ChatSpeaker], tmp_path: Path, name: str
) -> None:
    processor = save_published(PUBLISHED[name], tmp_path)
    speaker, picture = speakers(name), Image.new("RGB", (28, 28), "red")
    messages = messages_of(TWO_TURNS)
    conversation = their_messages(messages, [picture])
    whole = processor.apply_chat_template(conversation, tokenize=True, return_dict=True)["input_ids"][0]
    prompt = processor.apply_chat_template(
        conversation[:3], tokenize=True, add_generation_prompt=True, return_dict=True
    )["input_ids"][0]
    ours, image = speaker.speak(TWO_TURNS, cuts_of(name, TWO_TURNS)).ids, speaker.image_id

    def once(ids: list[int]) -> list[int]:
        """Each run of image ids as one."""
        return [each for place, each in enumerate(ids) if each != image or ids[place - 1] != image]

    if name in DIFFERS:
        tokens = ChatTokenizer(speaker.tokenizer, speaker.chat.template, speaker.chat.published).tokenizer
        spaced, asked = (tokens.decode(once(ids), skip_special_tokens=False) for ids in (whole, prompt))
        assert "".join(tokens.decode(ours, skip_special_tokens=False).split()) == "".join(spaced.split())
        # What leads to the last answer is theirs, but for how the first was asked for.
        last = asked[asked.index("Why?") :]
        assert last + "A dog" in tokens.decode(ours, skip_special_tokens=False)
        assert last + "A dog" not in spaced
    else:
        assert once(whole) == ours
        assert once(prompt) == ours[: len(once(prompt))]


@pytest.mark.parametrize("name", SPELT)
def test_a_picture_is_seen_as_in_chat(speakers: Callable[[str], ChatSpeaker], name: str) -> None:
    config = tiny_config() if name == "own" else PUBLISHED[name].config
    picture, speaker = Image.linear_gradient("L").resize((60, 31)).convert("RGB"), speakers(name)
    for is_alone in (True, False):
        seen = to_views(picture, speaker.image, config, is_alone)
        got = speaker.views(picture, config, is_alone)
        assert got.shape[0] == seen.cut.num_views
        assert (got == seen.pixels).all()


@pytest.mark.parametrize("name", SPELT)
def test_a_speaker_goes_to_other_processes(speakers: Callable[[str], ChatSpeaker], name: str) -> None:
    speaker = speakers(name)
    speaker.speak(TWO_TURNS, cuts_of(name, TWO_TURNS))
    again = pickle.loads(pickle.dumps(speaker))
    assert again == speaker
    assert again.speak(TWO_TURNS, cuts_of(name, TWO_TURNS)) == speaker.speak(TWO_TURNS, cuts_of(name, TWO_TURNS))


def test_speaking_needs_no_torch() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path[:0] = {sys.path!r}; import svcli_export.speaking; sys.exit('torch' in sys.modules)",
        ],
        check=False,
    )
    assert done.returncode == 0


def user(content: str = "What?", images: int = 0) -> Turn:
    return Turn("user", content, images)


def said(content: str = "A dog", images: int = 0) -> Turn:
    return Turn("assistant", content, images)


BROKEN = {
    "no turn of the assistant, so there is nothing to learn": [user()],
    "it begins with the assistant, whom nobody has asked": [said(), user(), said()],
    "two turns of the user one after the other": [user(), user(), said()],
    "two turns of the assistant one after the other": [user(), said(), said()],
    "a system turn that is not the first": [user(), said(), Turn("system", "x"), user(), said()],
    "an empty answer": [user(), said(" \n")],
    "a picture in a turn of the assistant": [user(), said("A dog", 1)],
    "a picture in a turn of the system": [Turn("system", "x", 1), user(), said()],
    "half of a character (a surrogate without its pair)": [user("\ud83d"), said()],
}


@pytest.mark.parametrize("reason", BROKEN)
@pytest.mark.parametrize("name", ["own", "llava", "llava_onevision"])
def test_what_no_chat_has_is_a_broken_sample(speakers: Callable[[str], ChatSpeaker], name: str, reason: str) -> None:
    with pytest.raises(BrokenSampleError) as refusal:
        speakers(name).speak(BROKEN[reason], cuts_of(name, BROKEN[reason]))
    assert str(refusal.value) == reason


def test_pictures_and_their_places_are_as_many(speakers: Callable[[str], ChatSpeaker]) -> None:
    with pytest.raises(BrokenSampleError, match=r"^1 places for 0 pictures$"):
        speakers("own").speak([user(images=1), said()], [])


def test_a_system_turn_comes_first_and_a_question_may_be_left_open(speakers: Callable[[str], ChatSpeaker]) -> None:
    speaker = speakers("llava_onevision")
    spoken = speaker.speak([Turn("system", "Be brief."), user(), said(), user("And?")], [])
    fed, to_say = spelt(speaker, spoken)
    assert fed.startswith("<|im_start|>system \nBe brief.<|im_end|><|im_start|>user \nWhat?")
    assert fed.endswith("A dog<|im_end|><|im_start|>user \nAnd?<|im_end|><|im_start|>assistant\n")
    assert to_say == "A dog<|im_end|>"


def test_a_question_may_be_a_picture_alone(speakers: Callable[[str], ChatSpeaker]) -> None:
    for name in ("own", "llava", "llava_next-mistral", "llava_next-llama3", "llava_onevision"):
        speaker = speakers(name)
        assert spelt(speaker, speaker.speak([user("", 1), said()], cuts_of(name, [user("", 1)])))[1].startswith("A dog")


TYPED = "<image> <|im_end|></s><end><end_of_utterance><|eot_id|> <s>"


@pytest.mark.parametrize("name", SPELT)
def test_what_people_wrote_is_no_special_token(speakers: Callable[[str], ChatSpeaker], name: str) -> None:
    speaker = speakers(name)
    turns = [user(TYPED, 1), said(TYPED)]
    spoken = speaker.speak(turns, cuts_of(name, turns))
    plain = speaker.speak([user("x", 1), said("x")], cuts_of(name, turns))
    assert spoken.ids.count(speaker.image_id) == plain.ids.count(speaker.image_id)
    assert sum(label in speaker.chat.stop_ids for label in spoken.labels) == 1
    assert TYPED in spelt(speaker, spoken)[1]


TURN = "{% for m in messages %}{{ m.role }}: {{ m.content[-1].text }} {% endfor %}"
WRITTEN = {
    "an answer that is asked for otherwise": TURN + "{% if add_generation_prompt %}robot:{% endif %}",
    "a question that is written otherwise later": "{% if messages | length > 1 %}again {% endif %}" + TURN,
}


@pytest.mark.parametrize("template", WRITTEN.values(), ids=WRITTEN)
def test_a_template_that_asks_otherwise_than_it_writes_is_said_so(
    speakers: Callable[[str], ChatSpeaker], template: str
) -> None:
    speaker = speakers("llava")
    other = ChatSpeaker(speaker.tokenizer, speaker.chat.model_copy(update={"template": template}), speaker.image)
    with pytest.raises(BrokenSampleError, match="writes an answer down otherwise than it asks for one"):
        other.speak([user(), said()], [])
    own = own_speaker("{% if messages | length > 1 %}x{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(BrokenSampleError, match="writes an answer down otherwise than it asks for one"):
        own.speak([user(), said()], [])


def test_the_stop_id_is_the_one_behind_the_answer_or_else_the_tokenizers(
    speakers: Callable[[str], ChatSpeaker],
) -> None:
    """Of several, one that is written wins; where none is, that of the tokenizer, not the smallest."""
    speaker = speakers("llava_onevision")
    assert len(speaker.chat.stop_ids) > 1
    tokens = ChatTokenizer(speaker.tokenizer, speaker.chat.template, speaker.chat.published).tokenizer
    ends = {name: tokens.token_to_id(name) for name in ("<|endoftext|>", "<|im_end|>")}
    chat = speaker.chat.model_copy(update={"stop_ids": tuple(sorted(ends.values()))})
    bare = chat.model_copy(update={"template": TURN + "{% if add_generation_prompt %}assistant:{% endif %}"})
    for each in (chat, bare):
        labels = ChatSpeaker(speaker.tokenizer, each, speaker.image).speak([user(), said()], []).labels
        assert [label for label in labels if label != IGNORE][-1] == ends["<|im_end|>"]
    spaced = bare.model_copy(update={"template": bare.template.replace("text }} ", "text }}\n<|endoftext|> ")})
    labels = ChatSpeaker(speaker.tokenizer, spaced, speaker.image).speak([user(), said()], []).labels
    assert [label for label in labels if label != IGNORE][-1] == ends["<|endoftext|>"]


def test_a_long_conversation_takes_no_longer_a_turn(speakers: Callable[[str], ChatSpeaker]) -> None:
    """About 10 ms; a template that were run for each answer, and all of it tokenised each time, would take seconds."""
    words = "How many people are there in it, and why not more?"
    for name in ("own", "llava", "llava_onevision"):
        speaker = speakers(name)
        turns = [user(words, 1)] + [[said, user][number % 2](words) for number in range(99)]
        taken = []
        for _ in range(3):  # of which one may meet what Python does now and then
            start = time.process_time()
            spoken = speaker.speak(turns, cuts_of(name, turns))
            taken.append(time.process_time() - start)
        assert min(taken) < 0.5
        assert sum(label in speaker.chat.stop_ids for label in spoken.labels) == 50

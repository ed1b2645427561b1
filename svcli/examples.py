"""What the help of each command ends with: a summary for the list of commands, and examples to start from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from textwrap import wrap

_WIDTH = 80
"""Columns that every terminal has."""


@dataclass(frozen=True)
class Usage:
    """How a command is shown."""

    summary: str
    """For the list of commands: one line of it."""
    examples: tuple[tuple[str, str], ...]
    """What it does, and the line that does it."""

    @property
    def epilog(self) -> str:
        """The end of the help. Each paragraph has the mark that keeps lines as they are."""
        shown = [f"  # {why}\n  {_folded(command)}" for why, command in self.examples]
        return "\n".join(["\b", "Examples:", *shown])


def _folded(command: str) -> str:
    """As a shell takes it in several lines, an option and its value in one."""
    joined = re.sub(r"(--?[a-z-]+) (?=[^-])", "\\1\0", command)
    lines = wrap(joined, _WIDTH - 8, break_long_words=False, break_on_hyphens=False)
    return " \\\n      ".join(lines).replace("\0", " ")


EPILOG = "\n".join(
    (
        "\b",
        "Examples:",
        '  svcli chat photo.jpg "what is this?"',
        "  svcli serve",
        "  svcli chat --help",
        "",
        "\b",
        "Exit codes:",
        "  0 done, 1 failed, 2 wrong input, 3 this machine lacks something,",
        "  130 stopped with Ctrl-C, 141 nobody reads on",
        "",
        "\b",
        "Completion is taken away with the file that --install-completion names:",
        "  ~/.bash_completions/svcli.sh, with the line of ~/.bashrc that reads it,",
        "  ~/.zfunc/_svcli, or ~/.config/fish/completions/svcli.fish",
        "",
        "\b",
        "Environment:",
        "  SVCLI_DEBUG=1    a traceback with each error",
        "  SVCLI_API_KEY    the key that `svcli serve` asks for",
        "  NO_COLOR         no colours",
    )
)
"""What the help of svcli itself ends with."""


USAGES: dict[str, Usage] = {
    "chat": Usage(
        "Ask about pictures, once or in a conversation.",
        (
            ("one answer, word by word", 'svcli chat photo.jpg "what is left of the dog?"'),
            ("a conversation; /help says what there is in it", "svcli chat photo.jpg"),
            ("what skipping changes: answers, tokens, bytes, times", 'svcli chat photo.jpg "how many?" --compare'),
            ("one JSON object, from your own bundle", 'svcli chat --model my-bundle photo.jpg "how many?" --json'),
        ),
    ),
    "ask": Usage(
        "Answer a file of questions about pictures.",
        (
            ("each line of the file is a picture and a question", "svcli ask questions.jsonl -o answers.jsonl"),
            (
                "paths of pictures start elsewhere, four answers at a time",
                "svcli ask questions.jsonl -o answers.jsonl --images photos --parallel 4",
            ),
        ),
    ),
    "serve": Usage(
        "Serve a model to programs that speak OpenAI's chat completions.",
        (
            ("the bundled model on http://127.0.0.1:8000, with a page to try it", "svcli serve"),
            ("your own, beside its graphs that skip nothing", "svcli serve my-bundle --name mine --variant dense"),
            (
                "for other machines, which then need the key",
                "svcli serve my-bundle --host 0.0.0.0 --api-key-file key.txt",
            ),
        ),
    ),
    "eval": Usage(
        "Score a bundle on a task, beside baselines.",
        (
            ("the tasks, and the files that each needs", "svcli eval --list"),
            ("drawn shapes, which need none", "svcli eval bundled --split shapes --limit 60"),
            (
                "a public task, with its wrong answers as a page",
                "svcli eval my-bundle pope --data POPE --html wrong.html",
            ),
        ),
    ),
    "sweep": Usage(
        "Score a model at several skip settings, and say which to choose.",
        (
            (
                "three settings of a trained model",
                "svcli sweep runs/tiny/checkpoint easy-vqa -o sweep --settings 24/40,44/69,96/64",
            ),
        ),
    ),
    # Its help is that of `run`.
    "bench": Usage("Time each stage of an answer, with skipping and without.", ()),
    "run": Usage(
        "Time each stage, which is what `svcli bench BUNDLE` does.",
        (
            ("the bundled model, on a picture that is drawn", "svcli bench run"),
            ("your own, as a page with plots", "svcli bench run my-bundle photo.jpg --html bench.html"),
            ("also side by side, and behind longer prompts", "svcli bench run --batch 1,2,4 --context 300,600"),
            ("with every round kept, to compare later", "svcli bench run my-bundle --json before.json"),
        ),
    ),
    "compare": Usage(
        "Hold two runs against each other.",
        (("what changed, where the interval allows to say so", "svcli bench compare before.json after.json"),),
    ),
    "inspect": Usage(
        "Show what a bundle is made of.",
        (
            ("the bundled model: graphs, shapes, KV rows, hashes", "svcli inspect"),
            ("the same for programs", "svcli inspect my-bundle --json"),
        ),
    ),
    "cost": Usage(
        "Show what one picture costs, dense against skipped.",
        (
            ("all of the paper's settings on a model", "svcli cost llava-1.5-7b-hf"),
            ("one of them, with times at best on a GPU", "svcli cost llava-1.5-7b-hf --preset sv-llava-100 --gpu h200"),
            ("a split of your own, from a folder's config.json", "svcli cost my-checkpoint --skip 64/64"),
        ),
    ),
    "profile": Usage(
        "Measure on pictures why visual tokens may skip the FFN.",
        (
            ("tables on stdout", "svcli profile my-bundle photo.jpg"),
            ("several pictures, and figures as PNG", "svcli profile my-checkpoint a.jpg b.jpg -o figures"),
        ),
    ),
    "verify": Usage(
        "Hold every engine against PyTorch, stage by stage.",
        (
            ("each engine that runs here, stage by stage", "svcli verify my-bundle"),
            (
                "one of them, against what the bundle was exported from",
                "svcli verify my-bundle --checkpoint runs/mine/checkpoint --engines onnxruntime",
            ),
        ),
    ),
    "doctor": Usage(
        "Show what this machine has, and what of svcli works on it.",
        (
            ("tables; exit code 1 where no engine runs", "svcli doctor"),
            ("to be sent along with a report", "svcli doctor --json"),
        ),
    ),
    "export": Usage(
        "Write a model as a bundle of ONNX graphs, for chat.",
        (
            ("what was trained", "svcli export runs/tiny/checkpoint -o my-bundle"),
            (
                "a published model, in 4 bits, with a setting of the paper",
                "svcli export llava-hf/llava-1.5-7b-hf -o llava --precision int4 --preset sv-llava-100",
            ),
            ("a bundle in fp16, for TensorRT", "svcli export my-bundle -o fp16-bundle --precision fp16"),
            ("graphs for a further split, on the same weights", "svcli export my-bundle -o more --variant 48/64"),
        ),
    ),
    "build-engine": Usage(
        "Build the TensorRT plans of a bundle.",
        (
            ("for the GPU of this machine, which is needed", "svcli build-engine fp16-bundle"),
            (
                "for others, with TensorRT-RTX and no GPU",
                "svcli build-engine fp16-bundle --backend tensorrt-rtx --target sm_89 --target sm_120",
            ),
        ),
    ),
    "triton": Usage(
        "Write a bundle as a model of NVIDIA's Triton Inference Server.",
        (("a repository that Triton loads", "svcli triton my-bundle -o model-repository"),),
    ),
    "train": Usage(
        "Train a model that there is, or a small one from nothing.",
        (
            ("the presets by name", "svcli train --list"),
            ("every key of a recipe", "svcli train recipes/skipvision-tiny.toml --print-config"),
            (
                "what is bundled, from nothing; started again, it goes on",
                "svcli train recipes/skipvision-tiny.toml -o runs/tiny",
            ),
            (
                "a published model on your own conversations",
                """svcli train sv-llava-100 -o runs/mine --set base=my-model --set 'data.sources=[{path="my.json"}]'""",
            ),
        ),
    ),
    "new": Usage(
        "Join a vision tower and a text decoder to a new model.",
        (
            (
                "to be trained; of each picture 100 tokens are retained, 156 skipped",
                "svcli new fresh --vision CLIP_FOLDER --text LLAMA_FOLDER --skip 100/156",
            ),
        ),
    ),
    "data": Usage(
        "Check conversations to train on, and fetch pictures.",
        (
            ("before a run: what of its data is broken", "svcli data check recipe.toml"),
            ("what the bundled model's pictures are made of", "svcli data fetch"),
        ),
    ),
    "check": Usage(
        "Read all that a recipe trains on, and name what is broken.",
        (
            ("what a run would read", "svcli data check recipe.toml"),
            ("a file alone, for a model", "svcli data check train.json --base my-checkpoint --images photos"),
        ),
    ),
    "fetch": Usage(
        "Download and unpack the packages with art, fonts and words.",
        (("into build/assets, where recipes look", "svcli data fetch"),),
    ),
}

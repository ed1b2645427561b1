"""`svcli chat`: pictures and a question in, an answer out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from svcli import ui
from svcli.__main__ import INTERRUPTED
from svcli.engines import EngineName, open_engine
from svcli.errors import UsageError
from svcli.remarks import remarks
from svcli.settings import bundled_model

if TYPE_CHECKING:
    from svcli_engines.generate import Stats

_ENDINGS = {
    "length": "the answer was cut off at --max-new-tokens",
    "context": "the answer was cut off: the context of this bundle is full",
}


def chat(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="Picture file.")],
    words: Annotated[
        list[str],
        typer.Argument(metavar="QUESTION", help="What to ask about it; further pictures may stand before it."),
    ],
    model: Annotated[
        Path | None, typer.Option(metavar="BUNDLE", help="Bundle folder; the bundled model if left out.")
    ] = None,
    engine: Annotated[
        EngineName,
        typer.Option(
            metavar="NAME",
            help="onnxruntime or onnxruntime-cuda; torch or torch-cuda; tensorrt or tensorrt-rtx, for which"
            " `svcli build-engine` made plans.",
        ),
    ] = EngineName.ONNXRUNTIME,
    threads: Annotated[int | None, typer.Option(min=1, metavar="N", help="Threads; one per core if left out.")] = None,
    temperature: Annotated[float, typer.Option(metavar="T", help="0: always the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(metavar="N", help="Draw among the N likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[
        float, typer.Option(metavar="P", help="Draw among the likeliest tokens that together have this probability.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(metavar="N", help="The same seed draws the same answer.")] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Longest answer.")] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout instead of text.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No notes and no closing line.")] = False,
) -> None:
    """Ask about a picture.

    The answer goes to stdout as it comes, everything else to stderr.
    """
    images, question = [image, *words[:-1]], words[-1]
    _check(images, question)
    from svcli_engines.generate import Conversation, Piece
    from svcli_engines.images import open_image
    from svcli_engines.processor import Processor
    from svcli_engines.sampling import Sampling
    from svcli_export.manifest import load_manifest

    sampling = Sampling(temperature, top_k, top_p, seed, max_new_tokens)
    answer, stats, stop_reason = "", None, "interrupted"
    with ui.ChatView(quiet=quiet or as_json) as view:
        view.wait("looking...")
        bundle = model or bundled_model()
        manifest = load_manifest(bundle, quick=True)
        pictures = [open_image(Path(path), manifest.image.transparency) for path in images]
        notes = [note for picture in pictures for note in picture.notes]
        view.note(*notes)
        notes += remarks(manifest.config)
        view.note(*remarks(manifest.config))
        processor = Processor(bundle, manifest)
        runner = open_engine(engine, bundle, manifest, threads=threads)
        conversation = Conversation(runner, processor)
        try:
            for event in conversation.ask(question, [picture.image for picture in pictures], sampling=sampling):
                if isinstance(event, Piece):
                    answer += event.text
                    if not as_json:
                        view.say(event.text)
                else:
                    stats, stop_reason = event, event.stop_reason
        except KeyboardInterrupt:  # what was said so far stands
            pass
        finally:
            runner.close()
        view.end_line()
        if stop_reason in _ENDINGS:
            notes.append(_ENDINGS[stop_reason])
            view.note(notes[-1])
        view.footer(closing_line(stats) if stats else [])
    if as_json:
        said = {"question": question, "images": images, "answer": answer, "stop_reason": stop_reason, "notes": notes}
        ui.show(json.dumps(said | {"model": str(bundle)} | (measured(stats) if stats else {})))
    if stop_reason == "interrupted":
        raise typer.Exit(INTERRUPTED)


def _check(images: list[str], question: str) -> None:
    """Raises UsageError for a missing question, or one in the wrong place, before anything is loaded."""
    if not question.strip():
        raise UsageError("the question is empty")
    # os.path and not pathlib, which raises where a question is longer than a file name can be.
    if os.path.isfile(question) and not os.path.exists(images[-1]):
        raise UsageError('the question comes last: svcli chat IMAGE "QUESTION"')


def closing_line(stats: Stats) -> list[str]:
    """What the answer took, in parts."""
    return [
        f"{stats.visual_tokens_full}→{stats.visual_tokens_kept} visual tokens",
        f"KV {ui.size_change(stats.kv_bytes_full, stats.kv_bytes)}",
        f"vision {ui.duration(stats.vision_seconds)}",
        f"prefill {ui.duration(stats.prefill_seconds)}",
        f"first token {ui.duration(stats.first_token_seconds)}",
        # An answer of one token has no rate.
        *([f"{stats.decode_tokens_per_second:.0f} tok/s"] if stats.decode_tokens_per_second else []),
        f"{stats.engine} {stats.precision}",
    ]


def measured(stats: Stats) -> dict[str, Any]:
    """The same, all of it, for programs."""
    return {
        "engine": stats.engine,
        "precision": stats.precision,
        "tokens": {
            "answer": stats.num_tokens,
            "prompt_rows": stats.num_prompt_rows,
            "visual_full": stats.visual_tokens_full,
            "visual_in": stats.visual_tokens_in,
            "visual_kept": stats.visual_tokens_kept,
        },
        "kv_cache": {
            "rows_full": stats.kv_rows_full,
            "rows": stats.kv_rows,
            "bytes_full": stats.kv_bytes_full,
            "bytes": stats.kv_bytes,
        },
        "seconds": {
            "load": stats.load_seconds,
            "vision": stats.vision_seconds,
            "prefill": stats.prefill_seconds,
            "first_token": stats.first_token_seconds,
        },
        "tokens_per_second": stats.decode_tokens_per_second,
    }

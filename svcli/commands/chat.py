"""`svcli chat`: pictures and questions in, answers out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svcli import completions
from svcli.answer_options import Bundle, MaxNewTokens, PrivateUrls, Seed, Temperature, Threads, TopK, TopP
from svcli.engines import EngineName
from svcli.errors import UsageError
from svcli.settings import bundled_model


def chat(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[IMAGE]... [QUESTION]",
            show_default=False,
            help="Pictures: files, patterns, URLs, or - for stdin. The last word is the question, unless it is a"
            " picture, too: then a conversation begins, or each line of stdin is a question.",
        ),
    ] = None,
    model: Bundle = None,
    engine: Annotated[
        EngineName,
        typer.Option(
            metavar="NAME",
            help="onnxruntime or onnxruntime-cuda; torch or torch-cuda; tensorrt or tensorrt-rtx, for which"
            " `svcli build-engine` made plans.",
        ),
    ] = EngineName.ONNXRUNTIME,
    variant: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Graphs of the bundle that answer, such as dense.",
            autocompletion=completions.bundle_variants,
        ),
    ] = None,
    threads: Threads = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="What the model is told first.")] = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    max_new_tokens: MaxNewTokens = 128,
    compare: Annotated[
        bool, typer.Option("--compare", help="Ask dense and skipped graphs, and set them side by side.")
    ] = False,
    save_overlay: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Write the picture with what was retained of it marked.")
    ] = None,
    log: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Append each turn to a .jsonl file, or to .sqlite or .db.")
    ] = None,
    allow_private_urls: PrivateUrls = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a turn on stdout instead of text.")] = False,
    as_jsonl: Annotated[
        bool, typer.Option("--jsonl", help="JSON lines on stdout: pieces as they come, turns.")
    ] = False,
    plain: Annotated[
        bool, typer.Option("--plain", help="Nothing drawn over, nothing decorated, such as for a screen reader.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="A table of what each answer took.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No notes and no closing line.")] = False,
) -> None:
    """Ask about pictures, once or in a conversation.

    Answers go to stdout as they come, everything else to stderr.
    """
    if as_json and as_jsonl:
        raise UsageError("--json and --jsonl are two ways to say the same: take one of them")
    from svcli.chat.arguments import as_text, read_arguments
    from svcli.chat.start import Options, start
    from svcli_engines.sampling import Sampling

    options = Options(
        bundle=model or bundled_model(),
        engine=engine,
        threads=threads,
        variant=variant,
        system=None if system is None else as_text(system),
        sampling=Sampling(temperature, top_k, top_p, seed, max_new_tokens),
        as_json=as_json,
        as_jsonl=as_jsonl,
        is_quiet=quiet,
        is_verbose=verbose,
        is_plain=plain,
        compares=compare,
        overlay=save_overlay,
        log=log,
        allow_private=allow_private_urls,
    )
    if code := start(read_arguments(words or []), options):
        raise typer.Exit(code)

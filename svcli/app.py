"""The command line: which commands there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from svcli import __version__, ui
from svcli.commands import bench as benching
from svcli.commands.ask import ask
from svcli.commands.build_engine import build_engine
from svcli.commands.chat import chat
from svcli.commands.cost import cost
from svcli.commands.data import check, fetch
from svcli.commands.doctor import doctor
from svcli.commands.eval import evaluate
from svcli.commands.export import export
from svcli.commands.inspect import inspect
from svcli.commands.new import new
from svcli.commands.profile import profile
from svcli.commands.serve import serve
from svcli.commands.sweep import sweep
from svcli.commands.train import train
from svcli.commands.triton import triton
from svcli.commands.verify import verify
from svcli.errors import reported
from svcli.examples import EPILOG, USAGES

app = typer.Typer(
    # Plain help: it starts faster, and reads the same as the one-line errors.
    rich_markup_mode=None,
    # Errors are ours to render: one sentence, see errors.py.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data = typer.Typer(help="What is trained on: conversations are checked, and what pictures are made of is fetched.")
bench = typer.Typer(cls=benching.RunUnlessNamed, help="Time each stage of an answer, with skipping and without.")


def _register(group: typer.Typer, *commands: Callable[..., None], **named: Callable[..., None]) -> None:
    """`named`: those that are not called as their functions are."""
    for name, command in {**{each.__name__.replace("_", "-"): each for each in commands}, **named}.items():
        usage = USAGES[name]
        group.command(name, short_help=usage.summary, epilog=usage.epilog)(reported(command))


_register(app, chat, ask, serve, eval=evaluate)
app.add_typer(bench, name="bench", short_help=USAGES["bench"].summary, epilog=USAGES["bench"].epilog)
_register(app, sweep, inspect, cost, profile, verify, doctor, export, build_engine, triton, train, new)
_register(data, check, fetch)
_register(bench, compare=benching.compare, run=benching.run)
app.add_typer(data, name="data", short_help=USAGES["data"].summary, epilog=USAGES["data"].epilog)


def _show_versions(wanted: bool) -> None:
    if wanted:
        from svcli.versions import versions

        ui.show(f"svcli {__version__}")
        for name, version in versions():
            ui.show(f"{name} {version}")
        raise typer.Exit


@app.callback(invoke_without_command=True, epilog=EPILOG)
def main(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_versions, is_eager=True, help="Print the versions of svcli and what it runs on."
        ),
    ] = False,
) -> None:
    """Skip-Vision: vision-language models that skip most of what they see, trained, exported and run."""
    del version  # its callback has done the work
    if context.invoked_subcommand is None:
        question = 'svcli chat PICTURE "what is this?"'
        ui.welcome(
            "Ask a small model about a picture, in this terminal.",
            [
                (question, "an answer, word by word"),
                (f"{question} --compare", "what skipping changes: answers, tokens, bytes, times"),
                ("svcli doctor", "what works on this machine, and the command for what does not"),
            ],
            "svcli --help lists every command, and svcli COMMAND --help has examples.",
        )

"""The command line: which commands there are."""

from __future__ import annotations

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

app = typer.Typer(
    add_completion=False,
    # Plain help: it starts faster, and reads the same as the one-line errors.
    rich_markup_mode=None,
    # Errors are ours to render: one sentence, see errors.py.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_COMMANDS = (
    *(chat, ask, serve, sweep, inspect, cost, profile, verify, doctor),
    *(export, build_engine, triton, train, new),
)
for command in _COMMANDS:
    app.command()(reported(command))
app.command("eval")(reported(evaluate))
data = typer.Typer(help="What is trained on: conversations are checked, and what pictures are made of is fetched.")
data.command()(reported(check))
data.command()(reported(fetch))
app.add_typer(data, name="data")
bench = typer.Typer(cls=benching.RunUnlessNamed, help="Time each stage of an answer, with skipping and without.")
bench.command()(reported(benching.run))
bench.command()(reported(benching.compare))
app.add_typer(bench, name="bench")


def _show_version(wanted: bool) -> None:
    if wanted:
        ui.show(f"svcli {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Skip-Vision: vision-language models that skip most of what they see, trained, exported and run."""
    del version  # its callback has done the work
    if context.invoked_subcommand is None:
        ui.welcome(
            "Ask a small model about a picture, in this terminal.",
            [
                ('svcli chat PICTURE "what is this?"', "an answer, word by word"),
                ("svcli inspect", "what the bundled model is made of"),
                (
                    "svcli --help",
                    "all commands: answering, measuring, exporting and training",
                ),
            ],
        )

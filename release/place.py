"""An environment for one extra, and how commands run in it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SECONDS = 900


class WrongError(RuntimeError):
    """What was not as it should be."""


class UntriedError(RuntimeError):
    """What cannot be tried here, and why."""


@dataclass(frozen=True)
class Place:
    """An environment, and the folder in which its commands run: with examples, recipes, and what earlier ones left."""

    environment: Path
    folder: Path

    def run(self, *command: str | Path, expected: int = 0) -> str:
        """stdout, and stderr behind it. Raises WrongError for another exit code."""
        program, *rest = map(str, command)
        done = subprocess.run(
            [str(self.environment / "bin" / program), *rest],
            cwd=self.folder,
            env=self.clean(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        said = done.stdout + done.stderr
        if done.returncode != expected:
            raise WrongError(f"{program} {' '.join(rest)} ended with {done.returncode}: {said.strip()[-600:]}")
        return said

    def clean(self) -> dict[str, str]:
        """Nothing of the source tree, nor of whoever runs this, but where pip looks."""
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "SVCLI"))
        }
        return kept | {"PATH": f"{self.environment / 'bin'}:{os.environ['PATH']}", "XDG_STATE_HOME": str(self.folder)}

    def python(self, code: str) -> str:
        return self.run("python", "-c", code)

    def make(self, *arguments: str | Path) -> None:
        """The environment, with what `pip install` takes these arguments for. Raises WrongError."""
        subprocess.run([sys.executable, "-m", "venv", str(self.environment)], check=True, capture_output=True)
        self.run("python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments)


def expect(condition: bool, what: str) -> None:
    """Raises WrongError unless `condition` holds."""
    if not condition:
        raise WrongError(what)

"""A bundle becomes a model of a repository: config.pbtxt, a model.py of two lines, and the bundle beside it."""

from __future__ import annotations

import errno
import os
import re
import shutil
from functools import partial
from pathlib import Path

from skipvision.folders import write_directory
from svcli.engines import EngineName
from svcli.triton.config import answering_config
from svcli.triton.settings import WRITER, Settings
from svcli_engines.plans import PLANS_FOLDER, Backend, check_fits, find_plan_sets, load_record
from svcli_export.manifest import MANIFEST_FILE, load_manifest

CONFIG_FILE = "config.pbtxt"
VERSION_FOLDER = "1"
BUNDLE_FOLDER = "bundle"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_BACKENDS: dict[str, Backend] = {EngineName.TENSORRT.value: "tensorrt", EngineName.TENSORRT_RTX.value: "tensorrt-rtx"}
_MODEL = '''"""Written by `svcli triton`."""

from svcli.triton.model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


class RepositoryError(ValueError):
    """A repository that cannot be written; one sentence with what to do instead."""


def write_model(bundle: Path, repository: Path, name: str, settings: Settings, *, overwrite: bool = False) -> Path:
    """Writes `repository/name` in one move, with the bundle in it, and returns that folder.

    Files are hard links where bundle and repository share a file system, so that weights are there once. Plans are
    those of the engine, for whatever GPUs there are.

    Raises RepositoryError, what load_manifest raises, NoVariantError, and PlanError where the engine runs plans and
    there are none, or others than the bundle's.
    """
    if not _NAME.fullmatch(name):
        raise RepositoryError(f"{name!r} is no name for a model: letters, digits, dots, dashes, 128 at most")
    folder = repository / name
    _check_place(folder, overwrite)
    manifest = load_manifest(bundle)
    if settings.variant is not None:
        manifest.variant(settings.variant)
    files = [MANIFEST_FILE, *manifest.files]
    if backend := _BACKENDS.get(settings.engine):
        if settings.variant is not None:
            raise RepositoryError("plans are of a bundle's own graphs, not of a variant; choose another engine")
        files += _plan_files(bundle, backend)
    try:
        write_directory(folder, partial(_write, bundle.resolve(), files, answering_config(name, settings)))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        # What was being copied is named first, and it is not there that room is missing.
        raise OSError(error.errno, error.strerror, str(folder)) from None
    return folder


def _check_place(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise RepositoryError(f"{folder} is a file; choose another folder")
    if folder.exists() and not overwrite:
        raise RepositoryError(f"{folder} exists; allow overwriting it (--overwrite), or choose another name")
    if folder.exists() and any(folder.iterdir()) and not _is_ours(folder):
        raise RepositoryError(f"{folder} is not empty and holds no model of svcli's; choose another name")


def _is_ours(folder: Path) -> bool:
    """Whether `svcli triton` wrote it, and nobody has put anything beside."""
    try:
        text = (folder / CONFIG_FILE).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    return f'parameters {{ key: "{WRITER}" ' in text and {each.name for each in folder.iterdir()} == {
        CONFIG_FILE,
        VERSION_FOLDER,
    }


def _plan_files(bundle: Path, backend: Backend) -> list[str]:
    """Of all sets of the backend, below the bundle. Raises PlanError for one that does not fit the bundle."""
    manifest, found = load_manifest(bundle, check_files=False), []
    sets = [plans for plans in find_plan_sets(bundle) if plans.backend == backend]
    if not sets:
        raise RepositoryError(f"{bundle} has no plans of {backend}; build them with `svcli build-engine`")
    for plans in sets:
        record = load_record(plans)
        check_fits(plans, record, manifest)
        place = f"{PLANS_FOLDER}/{plans.folder.name}"
        found += [f"{place}/{file}" for file in ("plan.json", *record.plans)]
    return found


def _write(bundle: Path, files: list[str], config: str, folder: Path) -> None:
    version = folder / VERSION_FOLDER
    version.mkdir()
    (folder / CONFIG_FILE).write_text(config, encoding="utf-8")
    (version / "model.py").write_text(_MODEL, encoding="utf-8")
    for name in files:
        place = version / BUNDLE_FOLDER / name
        place.parent.mkdir(parents=True, exist_ok=True)
        source = (bundle / name).resolve()  # a link to a link would lead nowhere elsewhere
        try:
            os.link(source, place)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(source, place)

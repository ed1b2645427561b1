"""Models by their id on the hub: what is fetched, and what is refused before it is. No torch.

Files go to the hub's own cache, where each appears in one move when all of it has come. Nothing is taken for whole
that has another size than the hub states.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipvision.config import ConfigError
from skipvision.families import read_model
from skipvision.hub_errors import HubError, NoModelError, NoRoomError, UnreachableError, explained

Progress = Callable[[str, int, int], None]
"""What is done, bytes so far, bytes in all."""
Note = Callable[[str], None]
"""Takes a sentence that the user should read, though nothing went wrong."""
Check = Callable[[str], object]
"""Takes the text of a config.json, and raises ConfigError for one that is no such model."""

LARGEST_MODEL = 200 * 10**9
"""Bytes; what is larger is refused."""
_LARGEST_DESCRIPTION = 64 * 2**20
"""Bytes of a config.json, an index, a tokenizer."""
_SECONDS = 10.0
"""How long the hub's first answer may take."""
_CONFIG, _INDEX, _SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
_BESIDE_WEIGHTS = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
_PICKLES = (".bin", ".pt", ".pth")
_PART = r"\w(?:[\w.-]{0,94}\w)?"
_ID = re.compile(rf"(?![^@]*(?:--|\.\.|\.git(?:@|$)))({_PART}/{_PART})(?:@([\w./-]+))?", re.ASCII)


@dataclass(frozen=True)
class HubId:
    """`owner/name` or `owner/name@revision`."""

    repo: str
    revision: str = "main"

    @classmethod
    def of(cls, name: str) -> HubId | None:
        """None for what cannot be an id."""
        match = _ID.fullmatch(name)
        return None if match is None else cls(match[1], match[2] or "main")

    def __str__(self) -> str:
        return self.repo if self.revision == "main" else f"{self.repo}@{self.revision}"


def find_model(
    name: str,
    *,
    with_weights: bool = True,
    check: Check = read_model,
    progress: Progress = lambda _what, _done, _total: None,
    note: Note = lambda _sentence: None,
) -> Path:
    """The folder of a model: `name` where it is one, or else the hub's snapshot of that id, fetched if it must be.

    Without weights it holds config.json alone. Where the hub cannot be reached, what was fetched whole before is
    used, and `note` told so. Raises NoModelError for a name with no model behind it, or none that can be loaded;
    ConfigError for an unknown family, before any weight is asked for; NoRoomError for too small a disk; HubError for
    what the hub, or the way to it, refuses.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    wanted = HubId.of(name)
    if wanted is None or folder.exists():
        raise NoModelError(f"{name}: {'is no folder' if folder.exists() else 'no such folder'}")
    try:
        from huggingface_hub.utils.logging import set_verbosity
    except ModuleNotFoundError:
        raise NoModelError(
            f"{name}: no such folder; to get a model of that name from the hub, install huggingface_hub:"
            ' pip install "svcli[torch]"'
        ) from None
    set_verbosity(logging.ERROR)
    try:
        found = _Repository.of(wanted)
    except UnreachableError as error:
        downloaded = _downloaded(wanted, with_weights)
        if downloaded is None:
            raise HubError(f"{name}: no such folder, nor was a model of that name downloaded whole; {error}") from None
        if not error.is_wanted:
            note(f"{wanted}: {error}; what was downloaded before is used")
        return downloaded
    return found.fetch(progress, check) if with_weights else found.fetch_config()


@dataclass(frozen=True)
class _Repository:
    """What the hub has under an id."""

    id: HubId
    commit: str
    sizes: Mapping[str, int]
    """Bytes of each file, by its path."""

    @classmethod
    def of(cls, wanted: HubId) -> _Repository:
        from huggingface_hub import HfApi

        with explained(wanted.repo, wanted.revision):
            info = HfApi().model_info(wanted.repo, revision=wanted.revision, files_metadata=True, timeout=_SECONDS)
        sizes = {file.rfilename: file.size for file in info.siblings or () if file.size is not None}
        return cls(wanted, str(info.sha), sizes)

    def fetch_config(self) -> Path:
        if _CONFIG not in self.sizes:
            raise NoModelError(f"{self.id} on the hub has no config.json, so it is no model that is known here")
        # By the revision's own name, so that the cache remembers which commit it stood for.
        folder = self._fetched(_CONFIG, self.id.revision).parent
        if folder.name != self.commit:
            raise HubError(f"{self.id} was changed on the hub in this moment; run the command again")
        return folder

    def fetch(self, progress: Progress, check: Check) -> Path:
        if _INDEX not in self.sizes and _SINGLE not in self.sizes:
            raise NoModelError(self._no_weights())
        folder = self.fetch_config()
        self._check_family(folder / _CONFIG, check)
        weights = [_SINGLE]
        if _INDEX in self.sizes:
            weights = shards(self._fetched(_INDEX))
        if lost := [file for file in weights if file not in self.sizes]:
            raise NoModelError(f"{self.id} on the hub lacks {lost[0]}, which its {_INDEX} names")
        # Weights last: where they are, all the rest is.
        files = [*(file for file in _BESIDE_WEIGHTS if file in self.sizes), *weights]
        size = sum(self.sizes[file] for file in files)
        if size > LARGEST_MODEL:
            raise NoModelError(f"{self.id} has {_gb(size)}; more than {_gb(LARGEST_MODEL)} is not downloaded")
        self._download(files, progress)
        return folder

    def _no_weights(self) -> str:
        if any(file.endswith(_PICKLES) for file in self.sizes):
            return (
                f"{self.id} on the hub has its weights as pickles only, which are not read: look for a conversion to"
                " safetensors among its revisions, or save it again with transformers (save_pretrained)"
            )
        return f"{self.id} on the hub has no weights: neither {_SINGLE} nor {_INDEX}"

    def _check_family(self, config: Path, check: Check) -> None:
        try:
            check(config.read_text(encoding="utf-8"))
        except (ConfigError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self.id}: config.json: {error}") from None

    def _download(self, files: Sequence[str], progress: Progress) -> None:
        missing = [file for file in files if not self._is_cached(file)]
        total = sum(self.sizes[file] for file in missing)
        _check_room(str(self.id), total)
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress(f"downloading {self.id}", min(done, total), total)

        so_far = 0
        for file in files:
            self._fetched(file, advance=advance)
            if file in missing:
                so_far += self.sizes[file]
                advance(so_far - done)

    def _is_cached(self, file: str) -> bool:
        from huggingface_hub import hf_hub_download

        with explained(self.id.repo, self.id.revision):
            return hf_hub_download(self.id.repo, file, revision=self.commit, dry_run=True).is_cached

    def _fetched(
        self, file: str, revision: str | None = None, advance: Callable[[int], None] = lambda _count: None
    ) -> Path:
        """Where the file lies, whole; what has another size is thrown away and fetched once more."""
        from huggingface_hub import hf_hub_download

        size = self.sizes[file]
        if not file.endswith(".safetensors") and size > _LARGEST_DESCRIPTION:
            raise NoModelError(f"{self.id}: {file} has {_gb(size)}, which is more than any that is known")
        for _ in range(2):
            with explained(self.id.repo, self.id.revision):
                path = Path(
                    hf_hub_download(self.id.repo, file, revision=revision or self.commit, tqdm_class=_bar(advance))
                )
            if path.stat().st_size == size:
                return path
            path.resolve().unlink()
            path.unlink(missing_ok=True)
        raise HubError(f"{self.id}: {file} came with another size than the hub states; try again later")


def shards(index: Path) -> list[str]:
    """Names of the files of an index. Raises HubError for what is no index, or names what is no file beside it."""
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise HubError(f"{index}: unreadable ({error!r})") from None
    for file in files:
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise HubError(f"{index}: {file!r} is no safetensors file beside it")
    return sorted(files)


def _downloaded(wanted: HubId, with_weights: bool) -> Path | None:
    """The snapshot in the cache, where it is whole. The cache links a file only when all of it has come."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(wanted.repo, _CONFIG, revision=wanted.revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    if with_weights:
        index = folder / _INDEX
        weights = shards(index) if index.is_file() else [_SINGLE]
        if not all((folder / file).is_file() for file in weights):
            return None
    return folder


def _check_room(name: str, size: int) -> None:
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE)
    place = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if size > free:
        raise NoRoomError(
            f"{name} needs {_gb(size)} and {_gb(free)} are free in {cache}; free some room, or set HF_HOME to a folder"
            " with more"
        )


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 10**8 else f"{size / 1e6:.1f} MB"


def _bar(advance: Callable[[int], None]) -> Any:
    """A class to be used in tqdm's place: it counts bytes, and draws nothing."""

    class Bar:
        def __init__(self, *_args: Any, initial: int = 0, **_options: Any) -> None:
            advance(initial)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_error: object) -> None:
            pass

        def update(self, count: float | None = 1) -> None:
            advance(int(count or 0))

        def update_transfer(self, count: float | None = 1) -> None:
            """Bytes on the wire, which are not those of the file."""

        def set_postfix_str(self, *_args: Any, **_options: Any) -> None:
            pass

        set_transfer_postfix_str = set_postfix_str

        def close(self) -> None:
            pass

    return Bar

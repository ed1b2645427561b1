"""Pictures and records as data sets have them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image


def encoded(size: tuple[int, int] = (30, 20), mode: str = "RGB", file_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, 200 if mode != "P" else 3).save(buffer, file_format, **options)
    return buffer.getvalue()


def asked(question: str, answer: str = "a red ball", **more: Any) -> dict[str, Any]:
    """A record in LLaVA's layout."""
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **more}


def write_lines(path: Path, records: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_tar(path: Path, members: Mapping[str, bytes] | Sequence[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items() if isinstance(members, Mapping) else members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path

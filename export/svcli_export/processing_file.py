"""What lies beside the weights of a checkpoint, so that it sees and is spoken to as what it was trained from.

Our own models need their tokenizer and chat template alone. Those that come from published ones have processing.json
too, with all else of their pictures and prompts. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from svcli_export.manifest import TOKENIZER_FILE, ChatFormat, ImageProcessing
from svcli_export.published_files import ProcessingError, read_object, read_text

TEMPLATE_FILE, PROCESSING_FILE = "chat_template.jinja", "processing.json"


class _Processing(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    chat: ChatFormat
    image: ImageProcessing


def checkpoint_files(tokenizer: str, chat: ChatFormat, image: ImageProcessing) -> Mapping[str, str]:
    """File names and texts."""
    files = {TOKENIZER_FILE: tokenizer, TEMPLATE_FILE: chat.template}
    if chat.published is not None:
        described = _Processing(chat=chat, image=image).model_dump_json(indent=2, exclude={"chat": {"template"}})
        files[PROCESSING_FILE] = described + "\n"
    return files


def read_processing_file(folder: Path) -> tuple[ChatFormat, ImageProcessing] | None:
    """None where there is none, as of our own models. Raises ProcessingError for a broken one."""
    path = folder / PROCESSING_FILE
    if not path.exists():
        return None
    data, template = read_object(folder, PROCESSING_FILE), read_text(folder, TEMPLATE_FILE)
    if template is None:
        raise ProcessingError(f"{folder}: {TEMPLATE_FILE} is missing")
    if isinstance(data.get("chat"), dict):
        data["chat"] |= {"template": template}
    try:
        # As JSON, whose lists are tuples.
        read = _Processing.model_validate_json(json.dumps(data))
    except ValidationError as error:
        first = error.errors()[0]
        raise ProcessingError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return read.chat, read.image

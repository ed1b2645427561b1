"""Pictures with questions and answers, made from freely licensed art."""

from __future__ import annotations

from skipvision.data.errors import DataError

__all__ = ["DataError"]

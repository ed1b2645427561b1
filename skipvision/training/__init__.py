"""Training: a model from nothing on composed pictures (`scratch`), or one that there is on conversations (`tune`)."""

from __future__ import annotations

"""A server that other programs can use: what OpenAI's clients send and read, over one scheduler a model."""

from __future__ import annotations

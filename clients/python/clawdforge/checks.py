"""Arguments, checked before anything is sent."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote


def text(value: str, name: str) -> str:
    """A text that is not empty."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} must be a text that is not empty")
    return value


def strings(values: Sequence[str], name: str) -> list[str]:
    """A list of texts."""
    if isinstance(values, str):
        raise TypeError(f"{name} must be a list, not one text")
    return list(values)


def segment(value: str, name: str) -> str:
    """A part of a path."""
    if text(value, name) in (".", ".."):
        raise ValueError(f"{name} can't be {value!r}")
    return quote(value, safe="")

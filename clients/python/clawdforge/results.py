"""What calls give."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RunResult:
    """A run that went well."""

    ok: bool
    #: A dict or list where the whole reply is one in JSON, the reply's text otherwise.
    result: Any
    #: Milliseconds that claude took.
    duration_ms: int
    stop_reason: str


@dataclass(frozen=True)
class FileToken:
    """An upload."""

    #: What ``files`` of a run or turn takes.
    file_token: str
    #: Seconds until the server deletes it.
    ttl_secs: int
    #: Bytes.
    size: int


@dataclass(frozen=True)
class AppToken:
    """An app's token."""

    name: str
    #: The bearer, known only when it is created.
    token: str | None = field(repr=False)
    #: Networks that it may be used from; empty for any.
    ip_cidrs: list[str]
    #: Unix seconds.
    created_at: int
    #: Unix seconds.
    last_used: int | None
    enabled: bool


@dataclass(frozen=True)
class TurnResult:
    """A turn that went well."""

    ok: bool
    session_id: str
    #: The session's completed turns, this one included.
    turn_index: int
    #: Every message of the agent, in order, each with a ``type``.
    events: list[dict[str, Any]]
    stop_reason: str
    #: Milliseconds.
    duration_ms: int

    def text(self) -> str:
        """What the agent said: the ``content`` of the events of type ``text``, joined."""
        return "".join(str(event.get("content", "")) for event in self.events if event.get("type") == "text")

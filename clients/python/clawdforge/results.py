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
class RunState:
    """A run, as far as it has come. What is not known yet is None."""

    run_id: str
    #: ``queued``, ``running``, ``succeeded``, ``failed``, ``timed_out``, ``cancelled``, or ``interrupted`` by the server's end.
    status: str
    #: None where another agent than claude chose its own.
    model: str | None
    #: Unix seconds.
    queued_at: int | None
    #: Unix seconds.
    started_at: int | None
    #: Unix seconds.
    finished_at: int | None
    #: Milliseconds, without the time in the queue.
    duration_ms: int | None
    #: As in a :class:`RunResult`.
    result: Any
    #: What went wrong, in words.
    error: str | None
    stop_reason: str | None
    input_tokens: int | None
    output_tokens: int | None
    cost_usd: float | None
    agent: str = "claude"

    @property
    def done(self) -> bool:
        """Whether it is over, well or not."""
        return self.status not in ("queued", "running")


@dataclass(frozen=True)
class Event:
    """What a run or turn said while it went on."""

    #: Counts from 1.
    id: int
    #: ``text``, ``thinking``, ``tool_call``, …; ``result`` is the last, and ``gap`` says that some are missing.
    name: str
    data: dict[str, Any]

    @property
    def text(self) -> str:
        """What the agent said, where this is a part of it; otherwise empty."""
        return str(self.data.get("content", "")) if self.name == "text" else ""


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
    #: What its webhooks are signed with, known only when it is created with one.
    webhook_secret: str | None = field(default=None, repr=False)


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
    #: The names that the turn's files have in the session's folder, in the order that they were given.
    files: list[str] = field(default_factory=list)

    def text(self) -> str:
        """What the agent said: the ``content`` of the events of type ``text``, joined."""
        return "".join(str(event.get("content", "")) for event in self.events if event.get("type") == "text")

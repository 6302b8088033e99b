"""A conversation of many turns."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from .checks import segment
from .results import TurnResult
from .stream import EventStream, Following, OnPermission, PermissionAnswer, Work, key_header, permission_body

if TYPE_CHECKING:
    from .client import Forge

#: What the server gives a turn that names no time, in seconds.
SERVER_TURN_TIMEOUT = 600


class Session:
    """An open session. Made by :meth:`Forge.session` or :meth:`Forge.create_session`."""

    def __init__(self, forge: Forge, id: str, agent: str) -> None:
        self._forge = forge
        self._closing = threading.Lock()
        self._closed = False
        #: 32 hex digits.
        self.id = id
        self.agent = agent

    def __repr__(self) -> str:
        return f"Session(id={self.id!r}, agent={self.agent!r})"

    @overload
    def turn(
        self,
        prompt: str,
        *,
        files: Sequence[str] | None = None,
        timeout_secs: int | None = None,
        idempotency_key: str | None = None,
        on_permission: OnPermission | None = None,
        stream: Literal[False] = False,
    ) -> TurnResult: ...

    @overload
    def turn(
        self,
        prompt: str,
        *,
        files: Sequence[str] | None = None,
        timeout_secs: int | None = None,
        idempotency_key: str | None = None,
        on_permission: OnPermission | None = None,
        stream: Literal[True],
    ) -> EventStream[TurnResult]: ...

    def turn(
        self,
        prompt: str,
        *,
        files: Sequence[str] | None = None,
        timeout_secs: int | None = None,
        idempotency_key: str | None = None,
        on_permission: OnPermission | None = None,
        stream: bool = False,
    ) -> TurnResult | EventStream[TurnResult]:
        """Sends a prompt and waits for the agent to end its turn.

        ``timeout_secs`` is 5 to 3600; without it the server allows 600. Turns of one session run one at a time.
        ``idempotency_key`` and ``stream`` are as in :meth:`Forge.run`; leaving a stream cancels its turn. ``on_permission``
        answers what the agent of a session with ``permissions="ask"`` asks; one that raises cancels the turn. Raises
        :class:`ForgeAPIError` with status 502 where the turn failed (the session stays usable), 410 where the session is
        closed, and 404 where there is none of that id.
        """
        body = self._forge._prompt(prompt, files)
        if timeout_secs is not None:
            body["timeout_secs"] = timeout_secs
        path, headers = f"/sessions/{self.id}", key_header(idempotency_key)
        if stream or on_permission is not None:
            work = Work(f"{path}/turn", "X-Turn", f"{path}/turns/{{}}", f"{path}/permissions")
            events = EventStream(Following(self._forge, work, body, headers), _turn_result, on_permission)
            return events if stream else events.read()
        timeout_secs = timeout_secs or SERVER_TURN_TIMEOUT
        return _turn_result(self._forge._call("POST", f"{path}/turn", json=body, headers=headers, timeout_secs=timeout_secs))

    def cancel(self) -> int:
        """Cancels the turn that is running and those that wait, and says how many. The session stays open."""
        return int(self._forge._call("POST", f"/sessions/{self.id}/cancel")["cancelled"])

    def permissions(self) -> list[dict[str, Any]]:
        """What its agent asks and nobody has answered yet."""
        return list(self._forge._call("GET", f"/sessions/{self.id}/permissions")["permissions"])

    def answer(self, permission_id: str, answer: PermissionAnswer) -> dict[str, Any]:
        """Answers what its agent asks. The same answer can be given again; status 409 for another, 410 where it is over."""
        path = f"/sessions/{self.id}/permissions/{segment(permission_id, 'permission_id')}"
        return self._forge._call("POST", path, json=permission_body(answer))

    def state(self) -> dict[str, Any]:
        """What the server knows of it: ``live``, ``turn_count``, ``last_turn_at``, ``closed_at``, …"""
        return self._forge.get_session(self.id)

    def close(self) -> None:
        """Closes it; a turn that is running is cancelled. Any number of times: one request is sent.

        After a :class:`ForgeError` it can be tried again.
        """
        with self._closing:
            if not self._closed:
                self._forge._call("DELETE", f"/sessions/{self.id}")
                self._closed = True


def _turn_result(answer: dict[str, Any]) -> TurnResult:
    return TurnResult(
        ok=answer["ok"],
        session_id=answer["session_id"],
        turn_index=answer["turn_index"],
        events=answer["events"],
        stop_reason=answer["stop_reason"],
        duration_ms=answer["duration_ms"],
        files=answer.get("files", []),
    )

"""A run or a turn, followed while it goes on."""

from __future__ import annotations

import json
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import requests

from .checks import segment
from .errors import ForgeAPIError, ForgeError, ForgeTransportError, api_error
from .results import Event

if TYPE_CHECKING:
    from .client import Forge

Result = TypeVar("Result", covariant=True)

#: ``"allow"`` or ``"deny"``, once; the id of an option; or what the server takes, such as ``{"decision": "deny", "message": "…"}``.
PermissionAnswer = str | Mapping[str, Any]
#: Answers what an agent asks: gets its message whole, with ``permission_id``, ``asked_at`` and ``expires_at``.
OnPermission = Callable[[dict[str, Any]], PermissionAnswer]

#: Times in a row, without a new event, that a broken connection is taken up again.
RESUMES = 3
#: Seconds after which the server says something on a stream, if only that it is there.
BEAT = 15


@dataclass(frozen=True)
class Work:
    """What a stream follows."""

    #: Where it is asked for.
    path: str
    #: The header with its id.
    header: str
    #: Where it is seen, with ``{}`` for its id.
    place: str
    #: Where what its agent asks is answered, with ``{}`` for its id.
    permissions: str


class Following:
    """A run or turn that is followed, over as many connections as it takes."""

    def __init__(self, forge: Forge, work: Work, body: dict[str, Any], headers: dict[str, str]) -> None:
        self._forge = forge
        self._work = work
        self._last = self._broken = 0
        # With a key the work outlives its connection, which can so be taken up again.
        headers = {"Idempotency-Key": str(uuid.uuid4())} | headers
        self._response = self._open("POST", work.path, json=body, headers=headers)
        self._events: Iterator[Event] | None = _events(self._response, 0)
        if work.header not in self._response.headers:
            self.stop()
            raise ForgeAPIError(self._response.status_code, None, "the answer is no stream; is this a clawdforge server?")
        self.id = self._response.headers[work.header]

    def next(self) -> Event:
        """The next event."""
        while True:
            try:
                self._events = self._events or self._resume()
                event = next(self._events, None)
                if event is None:
                    raise ForgeTransportError(f"{self._work.path}: the stream ended before its result")
                if event.id > self._last:
                    self._last, self._broken = event.id, 0
                return event
            except ForgeTransportError:
                if self._broken == RESUMES:
                    raise
                # At once, then with time for a server to come back.
                time.sleep(self._broken)
                self._broken += 1
                self._events = None

    def _resume(self) -> Iterator[Event]:
        headers = {"Last-Event-ID": str(self._last)}
        self._response = self._open("GET", self._work.place.format(self.id) + "/events", headers=headers)
        return _events(self._response, self._last)

    def _open(self, method: str, path: str, headers: dict[str, str], **request: Any) -> requests.Response:
        headers = {"Accept": "text/event-stream"} | headers
        return self._forge._send(method, path, timeout_secs=BEAT, headers=headers, stream=True, **request)

    def answer(self, permission_id: str, answer: PermissionAnswer) -> None:
        """Answers what its agent asks, unless that is over."""
        place = self._work.permissions.format(self.id)
        try:
            self._forge._call("POST", f"{place}/{segment(permission_id, 'permission_id')}", json=permission_body(answer))
        except ForgeAPIError as error:
            if error.status_code not in (409, 410):
                raise

    def stop(self) -> None:
        """Ends the connection."""
        self._events = None
        self._response.close()

    def leave(self) -> None:
        """Ends the connection and the work."""
        self.stop()
        with suppress(ForgeError):
            self._forge._call("DELETE", self._work.place.format(self.id))


class EventStream(Iterator[Event], Generic[Result]):
    """The events of a run or turn, the last one its ``result``. Made by ``stream=True``.

    Where the connection breaks, it goes on in another one, with nothing lost or doubled; :class:`ForgeTransportError` is for
    one that breaks again and again, and then the work goes on without a reader. Whoever leaves before the end cancels it: by
    :meth:`close`, at the end of ``with``, or by ``break`` from a loop over a stream that has no name.
    """

    def __init__(
        self, following: Following, read: Callable[[dict[str, Any]], Result], on_permission: OnPermission | None = None
    ) -> None:
        self._following = following
        self._read = read
        self._on_permission = on_permission
        self._result: Result | None = None
        # Also where nothing refers to this any more, and when Python ends.
        self._leave = weakref.finalize(self, following.leave)
        #: The run's id, or the turn's number.
        self.id = following.id

    def __repr__(self) -> str:
        return f"EventStream(id={self.id!r})"

    @property
    def result(self) -> Result:
        """What the call gives without ``stream``, once the stream is read to its end."""
        if self._result is None:
            raise ValueError("there is no result before the end of the stream")
        return self._result

    def __next__(self) -> Event:
        if not self._leave.alive:
            raise StopIteration
        try:
            event = self._following.next()
            if event.name == "error":
                # A problem says its status; a run or turn that failed is a 502.
                raise api_error(event.data.get("status", 502), "", event.data)
            if event.name == "permission_request" and self._on_permission is not None:
                self._answer(event, self._on_permission)
        except ForgeError:
            self._end()
            raise
        except BaseException:
            self.close()
            raise
        if event.name == "result":
            self._end()
            self._result = self._read(event.data)
        return event

    def _answer(self, event: Event, on_permission: OnPermission) -> None:
        try:
            self._following.answer(event.data["permission_id"], on_permission(event.data))
        except BaseException:
            # What was asked is refused with all the rest, also where the server did not take the answer.
            self.close()
            raise

    def read(self) -> Result:
        """Reads it to its end, and gives the result."""
        for _ in self:
            pass
        return self.result

    def _end(self) -> None:
        self._leave.detach()
        self._following.stop()

    def close(self) -> None:
        """Cancels the work, unless it is over."""
        self._leave()

    def __enter__(self) -> EventStream[Result]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def permission_body(answer: PermissionAnswer) -> dict[str, Any]:
    """What is sent for an answer."""
    if not isinstance(answer, str):
        return dict(answer)
    return {"decision": answer} if answer in ("allow", "deny") else {"option_id": answer}


def key_header(key: str | None) -> dict[str, str]:
    """The header of an idempotency key, if there is one."""
    if key is None:
        return {}
    if not 1 <= len(key) <= 255 or not all("!" <= character <= "~" for character in key):
        raise ValueError("idempotency_key must be 1 to 255 visible ASCII characters")
    return {"Idempotency-Key": key}


def _events(response: requests.Response, last: int) -> Iterator[Event]:
    """The events of an answer, but for one that is cut short: it comes again."""
    id, name, data = last, "", []
    try:
        for line in response.iter_lines(chunk_size=None):
            field, _, value = line.decode().partition(":")
            value = value.removeprefix(" ")
            if field == "id":
                id = int(value)
            elif field == "event":
                name = value
            elif field == "data":
                data.append(value)
            elif not line and data:
                yield Event(id, name, json.loads("\n".join(data)))
                name, data = "", []
    except requests.RequestException as error:
        raise ForgeTransportError(f"the stream broke ({type(error).__name__}: {error})") from error

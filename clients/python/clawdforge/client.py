"""The client."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, cast, overload

import requests

from .batches import Batches
from .checks import segment, strings, text
from .errors import ForgeAPIError, ForgeTransportError, api_error
from .multipart import file_part
from .results import AppToken, FileToken, RunResult, RunState
from .session import Session
from .stream import EventStream, Following, OnPermission, PermissionAnswer, Work, key_header, permission_body


class Forge:
    """A clawdforge server, as an app sees it.

    ``token`` is the app's bearer, or the operator's for the methods on tokens. ``default_timeout_secs`` is what a run may
    take; the HTTP request may take ``http_timeout_margin`` seconds more. ``session`` is a ``requests.Session`` of one's own,
    which stays open; otherwise one is made, and closed by :meth:`close` or at the end of ``with``.

    Every method raises :class:`ForgeTransportError` where no answer came, :class:`ForgeAuthError` for 401 and 403, and
    :class:`ForgeAPIError` for any other error. Nothing that does work is ever sent twice: a run costs money.
    """

    def __init__(
        self,
        *,
        base_url: str,
        token: str,
        default_model: str = "sonnet",
        default_timeout_secs: int = 120,
        http_timeout_margin: float = 30,
        session: requests.Session | None = None,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ValueError("base_url must begin with http:// or https://")
        # Checked here, because an error of the HTTP library would show it.
        if not token or not all("!" <= character <= "~" for character in token):
            raise ValueError("token must be a bearer token such as cf_…, without spaces or line ends")
        self.base_url = base_url.rstrip("/")
        self.default_model = default_model
        self.default_timeout_secs = default_timeout_secs
        self.http_timeout_margin = http_timeout_margin
        self._authorize = _bearer(token)
        self._http = session or requests.Session()
        self._owns_http = session is None

    def __repr__(self) -> str:
        return f"Forge(base_url={self.base_url!r})"

    def __enter__(self) -> Forge:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections, unless the ``requests.Session`` was given."""
        if self._owns_http:
            self._http.close()

    def healthz(self) -> dict[str, Any]:
        """Whether the server is well, and which CLIs it has. Needs no token, and sends none."""
        return self._call("GET", "/healthz", auth=_anonymous)

    @overload
    def run(
        self,
        prompt: str,
        *,
        model: str | None = None,
        system: str | None = None,
        files: Sequence[str] | None = None,
        timeout_secs: int | None = None,
        schema: dict[str, Any] | None = None,
        idempotency_key: str | None = None,
        agent: str | None = None,
        permissions: str | None = None,
        on_permission: OnPermission | None = None,
        permission_timeout_secs: int | None = None,
        stream: Literal[False] = False,
    ) -> RunResult: ...

    @overload
    def run(
        self,
        prompt: str,
        *,
        model: str | None = None,
        system: str | None = None,
        files: Sequence[str] | None = None,
        timeout_secs: int | None = None,
        schema: dict[str, Any] | None = None,
        idempotency_key: str | None = None,
        agent: str | None = None,
        permissions: str | None = None,
        on_permission: OnPermission | None = None,
        permission_timeout_secs: int | None = None,
        stream: Literal[True],
    ) -> EventStream[RunResult]: ...

    def run(
        self,
        prompt: str,
        *,
        model: str | None = None,
        system: str | None = None,
        files: Sequence[str] | None = None,
        timeout_secs: int | None = None,
        schema: dict[str, Any] | None = None,
        idempotency_key: str | None = None,
        agent: str | None = None,
        permissions: str | None = None,
        on_permission: OnPermission | None = None,
        permission_timeout_secs: int | None = None,
        stream: bool = False,
    ) -> RunResult | EventStream[RunResult]:
        """Runs a prompt and waits for the reply.

        ``files`` are the tokens of uploads, ``timeout_secs`` is 5 to 600. With ``schema``, a JSON Schema, the result is a value
        of that kind. Sent again with the same ``idempotency_key``, it gives the first one's answer and runs nothing. With
        ``stream`` it doesn't wait, but gives the events as they come. With ``on_permission`` the agent asks before it acts, and
        that answers; one that raises cancels the run. ``agent`` is another of the server's than claude, and ``permissions``
        are then ``deny-all``, ``approve-reads`` or ``approve-all``. An error with status 502 says in its message why the agent
        failed; 503 with ``Retry-After`` means that the server is busy.
        """
        body = self._run(
            prompt,
            files,
            timeout_secs,
            model=model,
            system=system,
            schema=schema,
            agent=agent,
            permissions=permissions if on_permission is None else "ask",
            permission_timeout_secs=permission_timeout_secs,
        )
        headers = key_header(idempotency_key)
        if stream or on_permission is not None:
            work = Work("/run", "X-Run-Id", "/runs/{}", "/runs/{}/permissions")
            events = EventStream(Following(self, work, body, headers), _run_result, on_permission)
            return events if stream else events.read()
        return _run_result(self._call("POST", "/run", json=body, headers=headers, timeout_secs=body["timeout_secs"]))

    def submit(
        self,
        prompt: str,
        *,
        model: str | None = None,
        system: str | None = None,
        files: Sequence[str] | None = None,
        timeout_secs: int | None = None,
        schema: dict[str, Any] | None = None,
        idempotency_key: str | None = None,
        agent: str | None = None,
        permissions: str | None = None,
        ask: bool = False,
        permission_timeout_secs: int | None = None,
        webhook: str | None = None,
    ) -> RunState:
        """Begins a run in the background, which goes on whatever becomes of this client; as :meth:`run` otherwise.

        With ``ask`` the agent asks before it acts: see :meth:`run_permissions`. ``webhook`` is told of its end, instead of the app's own: see
        :func:`clawdforge.webhooks.verify`.
        """
        body = self._run(
            prompt,
            files,
            timeout_secs,
            model=model,
            system=system,
            schema=schema,
            agent=agent,
            permissions="ask" if ask else permissions,
            permission_timeout_secs=permission_timeout_secs,
            webhook=webhook,
        )
        headers = key_header(idempotency_key) | {"Prefer": "respond-async"}
        return _run_state(self._call("POST", "/run", json=body, headers=headers))

    def get_run(self, run_id: str) -> RunState:
        """How far a run has come. Status 404 where this app has none of that id."""
        return _run_state(self._call("GET", f"/runs/{segment(run_id, 'run_id')}"))

    def run_permissions(self, run_id: str) -> list[dict[str, Any]]:
        """What a run's agent asks and nobody has answered yet."""
        return list(self._call("GET", f"/runs/{segment(run_id, 'run_id')}/permissions")["permissions"])

    def answer_run(self, run_id: str, permission_id: str, answer: PermissionAnswer) -> dict[str, Any]:
        """Answers what a run's agent asks. The same answer can be given again; status 409 for another, 410 where it is over."""
        path = f"/runs/{segment(run_id, 'run_id')}/permissions/{segment(permission_id, 'permission_id')}"
        return self._call("POST", path, json=permission_body(answer))

    def cancel(self, run_id: str) -> bool:
        """Ends a run, whose processes are gone when this returns; whether there was anything to end."""
        return not self._call("DELETE", f"/runs/{segment(run_id, 'run_id')}")["already_over"]

    def _run(self, prompt: str, files: Sequence[str] | None, timeout_secs: int | None, **more: Any) -> dict[str, Any]:
        if more["agent"] in (None, "claude"):
            more["model"] = more["model"] or self.default_model
        more["timeout_secs"] = self.default_timeout_secs if timeout_secs is None else timeout_secs
        return self._prompt(prompt, files) | {name: value for name, value in more.items() if value is not None}

    def upload_file(
        self,
        path_or_fileobj: str | os.PathLike[str] | BinaryIO,
        *,
        ttl_secs: int = 3600,
        filename: str | None = None,
        content_type: str | None = None,
    ) -> FileToken:
        """Uploads a file for runs and turns to read, in pieces: it is never whole in memory.

        ``ttl_secs`` is 60 to 86,400. A file object is read from where it stands, and stays open; it must be binary.
        """
        if isinstance(path_or_fileobj, (str, os.PathLike)):
            path = Path(path_or_fileobj)
            with path.open("rb") as file:
                return self._upload(file, filename or path.name, ttl_secs, content_type)
        if filename is None:
            # An open file has a path as its name, a pipe a number, a buffer none.
            name = getattr(path_or_fileobj, "name", None)
            filename = Path(name).name if isinstance(name, str) else "file"
        return self._upload(path_or_fileobj, filename, ttl_secs, content_type)

    def _upload(self, file: BinaryIO, filename: str, ttl_secs: int, content_type: str | None) -> FileToken:
        if not isinstance(file.read(0), bytes):
            raise TypeError("the file must be opened in binary mode")
        kind, body = file_part(file, filename, content_type or "application/octet-stream")
        answer = self._call("POST", "/files", params={"ttl_secs": ttl_secs}, data=body, headers={"Content-Type": kind})
        return FileToken(answer["file_token"], answer["ttl_secs"], answer["size"])

    @contextmanager
    def session(
        self,
        *,
        agent: str = "claude",
        model: str | None = None,
        meta: dict[str, Any] | None = None,
        system: str | None = None,
        permissions: str | None = None,
        permission_timeout_secs: int | None = None,
        allow_always: bool | None = None,
    ) -> Iterator[Session]:
        """A session for ``with``, closed at its end, however it ends."""
        session = self.create_session(
            agent=agent,
            model=model,
            meta=meta,
            system=system,
            permissions=permissions,
            permission_timeout_secs=permission_timeout_secs,
            allow_always=allow_always,
        )
        try:
            yield session
        except BaseException:
            # What went wrong first is what the caller has to see.
            with suppress(Exception):
                session.close()
            raise
        session.close()

    def create_session(
        self,
        *,
        agent: str = "claude",
        model: str | None = None,
        meta: dict[str, Any] | None = None,
        system: str | None = None,
        permissions: str | None = None,
        permission_timeout_secs: int | None = None,
        allow_always: bool | None = None,
        idempotency_key: str | None = None,
    ) -> Session:
        """Creates a session, which stays open until it is closed, or idle for as long as the server allows.

        ``system`` is added to the agent's system prompt. ``permissions`` are ``approve-all`` (the default), ``approve-reads``,
        ``deny-all`` or ``ask``: then what the agent wants to do is asked (``on_permission`` of :meth:`Session.turn`), and
        refused after ``permission_timeout_secs``, 10 to 3600. Sent again with the same ``idempotency_key``, it gives the first
        one's session.
        """
        body: dict[str, Any] = {"agent": agent}
        more = {
            "model": model,
            "meta": meta,
            "system": system,
            "permissions": permissions,
            "permission_timeout_secs": permission_timeout_secs,
            "allow_always": allow_always,
        }
        body |= {name: value for name, value in more.items() if value is not None}
        answer = self._call("POST", "/sessions", json=body, headers=key_header(idempotency_key))
        return Session(self, answer["session_id"], answer["agent"])

    def list_sessions(self, *, include_closed: bool = True) -> list[dict[str, Any]]:
        """This app's sessions, newest first."""
        params = {"include_closed": "true" if include_closed else "false"}
        return cast(list[dict[str, Any]], self._call("GET", "/sessions", params=params)["sessions"])

    def get_session(self, id: str) -> dict[str, Any]:
        """What the server knows of a session. Status 404 where this app has none of that id."""
        return self._call("GET", f"/sessions/{segment(id, 'id')}")

    @property
    def batches(self) -> Batches:
        """Many runs at once."""
        return Batches(self._call, lambda path: self._send("GET", path, stream=True))

    def create_token(self, name: str, ip_cidrs: Sequence[str] | None = None, *, webhook: str | None = None) -> AppToken:
        """Mints an app's token; this is the only time that it is shown. The operator's token is needed.

        ``webhook`` is told of what ends in the background; what it is signed with is ``webhook_secret``, shown this once too.
        """
        body: dict[str, Any] = {"name": text(name, "name")}
        if ip_cidrs:
            body["ip_cidrs"] = strings(ip_cidrs, "ip_cidrs")
        if webhook is not None:
            body["webhook"] = webhook
        answer = self._call("POST", "/admin/tokens", json=body)
        minted = answer["name"], answer["token"], list(answer["ip_cidrs"]), answer["created_at"]
        return AppToken(*minted, None, True, answer.get("webhook_secret"))

    def list_tokens(self) -> list[AppToken]:
        """The apps' tokens, without their bearers. The operator's token is needed."""
        return [
            AppToken(
                name=token["name"],
                token=None,
                ip_cidrs=[cidr for cidr in token["ip_cidrs"].split(",") if cidr],
                created_at=token["created_at"],
                last_used=token["last_used"],
                enabled=token["enabled"],
            )
            for token in self._call("GET", "/admin/tokens")["tokens"]
        ]

    def revoke_token(self, name: str) -> bool:
        """Revokes an app's token, from its next request on. True; status 404 where there is none of that name."""
        self._call("DELETE", f"/admin/tokens/{segment(name, 'name')}")
        return True

    def _prompt(self, prompt: str, files: Sequence[str] | None) -> dict[str, Any]:
        body: dict[str, Any] = {"prompt": text(prompt, "prompt")}
        if files:
            body["files"] = strings(files, "files")
        return body

    def _call(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        response = self._send(method, path, **request)
        body = _body(response)
        if not isinstance(body, dict):
            message = "the answer is not a JSON object; is this a clawdforge server?"
            raise ForgeAPIError(response.status_code, body, message)
        return body

    def _send(self, method: str, path: str, *, timeout_secs: float | None = None, **request: Any) -> requests.Response:
        timeout = (self.default_timeout_secs if timeout_secs is None else timeout_secs) + self.http_timeout_margin
        # Not a header: the HTTP library would put one from ~/.netrc in its place.
        request.setdefault("auth", self._authorize)
        try:
            response = self._http.request(method, self.base_url + path, timeout=timeout, allow_redirects=False, **request)
            ok = 200 <= response.status_code < 300
            body = None if ok else _body(response)
        except (requests.exceptions.InvalidJSONError, requests.exceptions.InvalidURL) as error:
            raise ValueError(str(error)) from error
        except requests.RequestException as error:
            raise ForgeTransportError(f"{method} {path}: no answer came ({type(error).__name__}: {error})") from error
        if not ok:
            raise api_error(response.status_code, response.reason, body)
        return response


def _body(response: requests.Response) -> dict[str, Any] | str | None:
    try:
        body = response.json()
    except ValueError:
        body = None
    return body if isinstance(body, dict) else response.text or None


def _run_result(answer: dict[str, Any]) -> RunResult:
    return RunResult(answer["ok"], answer["result"], answer["duration_ms"], answer["stop_reason"])


def _run_state(answer: dict[str, Any]) -> RunState:
    # An older server does not say which agent it was.
    return RunState(**{field.name: answer[field.name] for field in fields(RunState) if field.name in answer})


def _bearer(token: str) -> Callable[[requests.PreparedRequest], requests.PreparedRequest]:
    def authorize(request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {token}"
        return request

    return authorize


def _anonymous(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


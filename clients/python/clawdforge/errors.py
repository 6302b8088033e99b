"""What can go wrong."""

from __future__ import annotations

from typing import Any


class ForgeError(Exception):
    """Any failure of a call."""


class ForgeTransportError(ForgeError):
    """No whole answer came. Whether the server got the request is not known, so nothing is sent again."""


class ForgeAPIError(ForgeError):
    """The server answered with an error.

    ``status_code`` is the HTTP status; ``body`` the answer as a dict, as text where it is no JSON object, or None where it
    is empty; ``message`` says what to do, in the server's words where it gave any.
    """

    def __init__(self, status_code: int, body: dict[str, Any] | str | None, message: str) -> None:
        super().__init__(status_code, body, message)
        self.status_code = status_code
        self.body = body
        self.message = message

    def __str__(self) -> str:
        return f"HTTP {self.status_code}: {self.message}"


class ForgeAuthError(ForgeAPIError):
    """The token is unknown or revoked (401), or not allowed to do this from here (403)."""


def api_error(status_code: int, reason: str, body: dict[str, Any] | str | None) -> ForgeAPIError:
    """The exception for an answer, with the server's own words."""
    kind = ForgeAuthError if status_code in (401, 403) else ForgeAPIError
    if not isinstance(body, dict):
        # Not the text: a proxy's page may repeat the request with its headers.
        return kind(status_code, body, reason or "the server gave no reason")
    # A problem has a detail; a run or turn that failed has an error.
    message = str(body.get("detail") or body.get("error") or body.get("title") or "the server gave no reason")
    errors = body.get("errors")
    if isinstance(errors, list):
        places = [f"{error.get('pointer')}: {error.get('detail')}" for error in errors if isinstance(error, dict)]
        message = " ".join([message, *(f"[{place}]" for place in places)])
    return kind(status_code, body, message)

"""Webhooks: what the server sends when something in the background has ended, signed as https://www.standardwebhooks.com has it."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import time
from collections.abc import Mapping
from typing import Any

from .errors import ForgeError

#: How far the clocks may be apart, in seconds.
TOLERANCE = 300


class WebhookError(ForgeError):
    """A request that the server did not send, or not now."""


def verify(secret: str, headers: Mapping[str, str], body: bytes | str, *, tolerance: float = TOLERANCE) -> dict[str, Any]:
    """What a webhook says: ``type``, ``timestamp``, ``data``. Raises :class:`WebhookError` unless it is signed with ``secret``.

    ``secret`` is the app's ``whsec_…``; ``body`` is what came, to the byte. One webhook may come more than once: its ``webhook-id`` is
    the same each time.
    """
    given = {name.lower(): value for name, value in headers.items()}
    missing = [name for name in ("webhook-id", "webhook-timestamp", "webhook-signature") if name not in given]
    if missing:
        raise WebhookError(f"the request has no {missing[0]}")
    try:
        key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except binascii.Error:
        raise ValueError("secret must be the app's whsec_…") from None
    raw = body.encode() if isinstance(body, str) else body
    try:
        apart = abs(time.time() - int(given["webhook-timestamp"]))
    except ValueError:
        raise WebhookError("the webhook-timestamp is no number") from None
    if apart > tolerance:
        raise WebhookError(f"the webhook was signed {apart:.0f} s ago or ahead")
    signed = f"{given['webhook-id']}.{given['webhook-timestamp']}.".encode() + raw
    expected = "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    signatures = given["webhook-signature"].split(" ")
    # All of them, so that how long it takes tells nothing.
    if not any([hmac.compare_digest(expected.encode(), signature.encode()) for signature in signatures]):
        raise WebhookError("the webhook is not signed with this secret")
    said = json.loads(raw)
    if not isinstance(said, dict):
        raise WebhookError("the webhook says nothing")
    return said

"""Webhooks are verified as the specification's own vectors have it."""

from __future__ import annotations

import time
import unittest

from clawdforge import WebhookError, webhooks

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
BODY = b'{"test": 2432232314}'
HEADERS = {
    "Webhook-Id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
    "Webhook-Timestamp": "1614265330",
    "Webhook-Signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
}


class Verify(unittest.TestCase):
    def verify(self, headers: dict[str, str] = HEADERS, body: bytes | str = BODY, secret: str = SECRET) -> dict[str, object]:
        return webhooks.verify(secret, headers, body, tolerance=time.time())

    def test_what_is_signed(self) -> None:
        self.assertEqual(self.verify(), {"test": 2432232314})
        self.assertEqual(self.verify(body=BODY.decode()), {"test": 2432232314})
        several = "v1,AAAA v2,x " + HEADERS["Webhook-Signature"]
        self.assertEqual(self.verify(HEADERS | {"Webhook-Signature": several}), {"test": 2432232314})

    def test_what_is_not(self) -> None:
        for headers, body in (
            (HEADERS, BODY + b" "),
            (HEADERS | {"Webhook-Id": "msg_1"}, BODY),
            (HEADERS | {"Webhook-Timestamp": "1614265331"}, BODY),
            (HEADERS | {"Webhook-Timestamp": "soon"}, BODY),
            (HEADERS | {"Webhook-Signature": ""}, BODY),
            (HEADERS | {"Webhook-Signature": "v1,grüße"}, BODY),
            ({}, BODY),
        ):
            with self.assertRaises(WebhookError):
                self.verify(headers, body)
        with self.assertRaises(WebhookError):
            self.verify(secret="whsec_AAAA")
        with self.assertRaises(ValueError):
            self.verify(secret="whsec_!")

    def test_what_is_old(self) -> None:
        with self.assertRaisesRegex(WebhookError, "ago"):
            webhooks.verify(SECRET, HEADERS, BODY)

"""A receiver that verifies webhooks with the specification's own library, and with this project's client. To be run by with-demo.sh."""

import json
import os
import queue
import threading
import unittest
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from clawdforge import Forge, WebhookError, webhooks
from standardwebhooks import Webhook, WebhookVerificationError

URL, ADMIN = os.environ["CLAWDFORGE_URL"], os.environ["CLAWDFORGE_ADMIN_TOKEN"]


class Receiver(unittest.TestCase):
    def test_what_ends_in_the_background_is_told_and_can_be_verified(self) -> None:
        came: queue.Queue = queue.Queue()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                came.put((dict(self.headers), body))
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.addCleanup(server.server_close)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.addCleanup(server.shutdown)
        hook = f"http://127.0.0.1:{server.server_port}/hook?full=1"
        with Forge(base_url=URL, token=ADMIN) as operator:
            app = operator.create_token(f"hooks-{uuid.uuid4().hex[:8]}", webhook=hook)
        secret = app.webhook_secret
        self.assertNotIn(secret, repr(app))
        with Forge(base_url=URL, token=app.token) as forge:
            run = forge.submit('Hello.\nstub: {"text": "Grüße"}')
        headers, body = came.get(timeout=60)
        for said in (Webhook(secret).verify(body, headers), webhooks.verify(secret, headers, body), json.loads(body)):
            self.assertEqual(said["type"], "run.finished")
            self.assertEqual(list(said["data"])[0], "run_id")
            self.assertEqual((said["data"]["run_id"], said["data"]["result"]), (run.run_id, "Grüße"))
        other = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
        for wrong in ((other, headers, body), (secret, headers, body + b" "), (secret, headers | {"webhook-id": "msg_1"}, body)):
            with self.assertRaises(WebhookVerificationError):
                Webhook(wrong[0]).verify(wrong[2], wrong[1])
            with self.assertRaises(WebhookError):
                webhooks.verify(*wrong)


if __name__ == "__main__":
    unittest.main()

"""The client by itself: what it sends, and what it makes of answers."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
import socket
import tempfile
import threading
import time
import tracemalloc
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import requests
import responses

from clawdforge import Forge, ForgeAPIError, ForgeAuthError, ForgeError, ForgeTransportError, Session

URL = "http://forge.test"
TOKEN = "cf_0123456789abcdef"
RUN = {"ok": True, "result": "hi", "duration_ms": 5, "stop_reason": "end_turn"}
SESSION = {"ok": True, "session_id": "ab12", "agent": "claude", "model": None, "cwd": "/", "created_at": 1, "meta": None}
TURN = {"ok": True, "session_id": "ab12", "turn_index": 1, "events": [], "stop_reason": "end_turn", "duration_ms": 7}
CLOSED = {"ok": True, "session_id": "ab12", "already_closed": False}
STATE = {
    "run_id": "0a", "status": "running", "model": "opus", "queued_at": 1, "started_at": 2, "finished_at": None,
    "duration_ms": None, "result": None, "error": None, "stop_reason": None, "input_tokens": None, "output_tokens": None,
    "cost_usd": None,
}
PROBLEM = {"type": "about:blank", "title": "Unprocessable", "status": 422, "detail": "Mend the body."}


def forge(**options: Any) -> Forge:
    return Forge(base_url=URL, token=TOKEN, **options)


def sent(call: int = -1) -> Any:
    """The body of a request, read as JSON."""
    return json.loads(cast(bytes, responses.calls[call].request.body or b"null"))


def header(name: str, call: int = -1) -> str | None:
    return responses.calls[call].request.headers.get(name)


def timeout(call: int = -1) -> object:
    return cast(Any, responses.calls[call].request).req_kwargs["timeout"]


class Runs(unittest.TestCase):
    @responses.activate
    def test_what_is_sent_and_given(self) -> None:
        responses.post(f"{URL}/run", json=RUN)
        result = forge().run("-p\n", system="short", files=["ff_1"], model="opus", timeout_secs=300)
        self.assertEqual((result.ok, result.result, result.duration_ms, result.stop_reason), (True, "hi", 5, "end_turn"))
        self.assertEqual(sent(), {"prompt": "-p\n", "system": "short", "files": ["ff_1"], "model": "opus", "timeout_secs": 300})
        self.assertEqual((header("Authorization"), timeout()), (f"Bearer {TOKEN}", 330))

    @responses.activate
    def test_the_defaults_are_the_clients(self) -> None:
        responses.post(f"{URL}/run", json=RUN)
        forge().run("hello")
        self.assertEqual((sent(), timeout()), ({"prompt": "hello", "model": "sonnet", "timeout_secs": 120}, 150))
        forge(default_model="haiku", default_timeout_secs=10, http_timeout_margin=2.5).run("hello")
        self.assertEqual((sent(), timeout()), ({"prompt": "hello", "model": "haiku", "timeout_secs": 10}, 12.5))

    @responses.activate
    def test_a_run_in_the_background(self) -> None:
        responses.post(f"{URL}/run", status=202, json=STATE | {"status": "queued"})
        state = forge().submit("hello", model="opus", timeout_secs=300)
        self.assertEqual((state.run_id, state.done, state.queued_at, state.result), ("0a", False, 1, None))
        self.assertEqual((sent(), timeout()), ({"prompt": "hello", "model": "opus", "timeout_secs": 300}, 150))
        self.assertEqual((header("Prefer"), header("Idempotency-Key")), ("respond-async", None))
        over = {"status": "succeeded", "result": {"a": 1}, "cost_usd": 0.5, "later": 1}
        for answer, done, result in ((STATE, False, None), (STATE | over, True, {"a": 1}), (STATE | {"status": "failed"}, True, None)):
            responses.upsert("GET", f"{URL}/runs/0%2Fa", json=answer)
            state = forge().get_run("0/a")
            self.assertEqual((state.status, state.done, state.result), (answer["status"], done, result))
        for over_before in (False, True):
            responses.upsert("DELETE", f"{URL}/runs/0a", json={"ok": True, "run_id": "0a", "already_over": over_before})
            self.assertIs(forge().cancel("0a"), not over_before)

    @responses.activate
    def test_another_agent_has_its_own_model_and_permissions(self) -> None:
        responses.post(f"{URL}/run", json=RUN)
        forge().run("hello", agent="gemini", permissions="approve-all")
        asked = {"prompt": "hello", "agent": "gemini", "timeout_secs": 120}
        self.assertEqual(sent(), asked | {"permissions": "approve-all"})
        # Said without need, for the server to refuse.
        forge().run("hello", agent="claude", permission_timeout_secs=5)
        self.assertEqual(sent(), asked | {"agent": "claude", "model": "sonnet", "permission_timeout_secs": 5})
        responses.replace("POST", f"{URL}/run", json=STATE | {"agent": "gemini", "model": None})
        state = forge().submit("hello", agent="gemini", model="gemini-2.5-pro", ask=True, permission_timeout_secs=20)
        self.assertEqual(sent(), asked | {"model": "gemini-2.5-pro", "permissions": "ask", "permission_timeout_secs": 20})
        self.assertEqual((state.agent, state.model), ("gemini", None))

    @responses.activate
    def test_a_key_and_a_schema_are_sent(self) -> None:
        responses.post(f"{URL}/run", json=RUN)
        responses.post(f"{URL}/sessions", json=SESSION)
        responses.post(f"{URL}/sessions/ab12/turn", json=TURN)
        schema = {"type": "object"}
        forge().run("hello", schema=schema, idempotency_key="k-1")
        self.assertEqual((sent()["schema"], header("Idempotency-Key")), (schema, "k-1"))
        forge().create_session(idempotency_key="k-2").turn("hello", idempotency_key="k-3")
        self.assertEqual([header("Idempotency-Key", call) for call in (1, 2)], ["k-2", "k-3"])
        responses.replace("POST", f"{URL}/run", json=STATE)
        forge().submit("hello", schema=schema, idempotency_key="k-4")
        self.assertEqual((sent()["schema"], header("Idempotency-Key"), header("Prefer")), (schema, "k-4", "respond-async"))

    @responses.activate
    def test_bad_input_is_refused_before_anything_is_sent(self) -> None:
        for call in (
            lambda: forge().run(""),
            lambda: forge().get_session(""),
            lambda: forge().get_session(".."),
            lambda: forge().get_run(""),
            lambda: forge().cancel(""),
            lambda: forge().run("hello", stream=True, idempotency_key=""),
            lambda: forge().submit("hello", idempotency_key="a b"),
            lambda: Session(forge(), "ab12", "claude").turn("hello", idempotency_key="k" * 256),
            lambda: forge().create_session(idempotency_key="ü"),
            lambda: forge().revoke_token(""),
            lambda: forge().create_token(""),
            lambda: Session(forge(), "ab12", "claude").turn(""),
            lambda: forge().create_session(meta={"n": float("nan")}),
            lambda: Forge(base_url="forge.test", token=TOKEN),
            lambda: Forge(base_url=URL, token=""),
        ):
            self.assertRaises(ValueError, call)
        self.assertRaises(TypeError, lambda: forge().run("hello", files="ff_1"))
        self.assertEqual(len(responses.calls), 0)

    @responses.activate
    def test_the_address_may_have_a_slash_and_a_path(self) -> None:
        responses.get(f"{URL}/forge/healthz", json={"ok": True})
        self.assertEqual(Forge(base_url=f"{URL}/forge/", token=TOKEN).healthz(), {"ok": True})
        self.assertIsNone(header("Authorization"))

    @responses.activate
    def test_the_bearer_is_ours_whatever_netrc_says(self) -> None:
        responses.get(f"{URL}/admin/tokens", json={"tokens": [], "count": 0})
        with tempfile.TemporaryDirectory() as folder:
            netrc = Path(folder, "netrc")
            netrc.write_text("machine forge.test login someone password secret\n")
            os.environ["NETRC"] = str(netrc)
            self.addCleanup(os.environ.pop, "NETRC")
            forge().list_tokens()
        self.assertEqual(header("Authorization"), f"Bearer {TOKEN}")


class Errors(unittest.TestCase):
    def error(self, status: int, **answer: Any) -> ForgeAPIError:
        with responses.RequestsMock() as mock:
            mock.post(f"{URL}/run", status=status, **answer)
            with self.assertRaises(ForgeAPIError) as caught:
                forge().run("hello")
            self.assertEqual(len(mock.calls), 1)
        return caught.exception

    def test_the_servers_words_are_in_the_message(self) -> None:
        body = PROBLEM | {"errors": [{"pointer": "/timeout_secs", "detail": "too long"}]}
        error = self.error(422, json=body)
        self.assertEqual((error.status_code, error.body), (422, body))
        self.assertEqual(error.message, "Mend the body. [/timeout_secs: too long]")
        self.assertEqual(str(error), "HTTP 422: Mend the body. [/timeout_secs: too long]")
        failed = {"ok": False, "error": "overloaded", "stderr": "", "duration_ms": 1, "stop_reason": "timeout"}
        self.assertEqual((self.error(502, json=failed).message, self.error(502, json=failed).body), ("overloaded", failed))

    def test_a_refused_token_has_a_type_of_its_own(self) -> None:
        for status in (401, 403):
            self.assertIsInstance(self.error(status, json=PROBLEM), ForgeAuthError)
        self.assertNotIsInstance(self.error(404, json=PROBLEM), ForgeAuthError)

    def test_an_answer_that_is_no_json_object(self) -> None:
        page = self.error(500, body=f"<h1>Oh</h1> Authorization: Bearer {TOKEN}")
        self.assertTrue(str(page.body).startswith("<h1>Oh</h1>"))
        self.assertEqual(str(page), "HTTP 500: Internal Server Error")
        self.assertIsNone(self.error(500).body)
        self.assertEqual(self.error(200, json=[1]).body, "[1]")
        moved = self.error(307, headers={"Location": "http://elsewhere.test/run"})
        self.assertEqual(moved.status_code, 307)

    def test_an_error_outlives_pickling(self) -> None:
        error = pickle.loads(pickle.dumps(self.error(422, json=PROBLEM)))
        self.assertEqual((str(error), error.status_code, error.body), ("HTTP 422: Mend the body.", 422, PROBLEM))

    def test_no_answer_is_a_transport_error_and_nothing_is_sent_again(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            url = f"http://127.0.0.1:{server.getsockname()[1]}"
            requests_seen = []

            def hang_up() -> None:
                with contextlib.suppress(OSError):
                    while True:
                        connection, _ = server.accept()
                        requests_seen.append(connection.recv(65536))
                        connection.close()

            threading.Thread(target=hang_up, daemon=True).start()
            with self.assertRaises(ForgeTransportError) as caught, Forge(base_url=url, token=TOKEN) as client:
                client.run("hello")
            self.assertIn("POST /run", str(caught.exception))
            self.assertEqual(len(requests_seen), 1)
        with self.assertRaises(ForgeTransportError):
            Forge(base_url=url, token=TOKEN).run("hello")

    def test_a_server_that_does_not_answer_is_given_up(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            begun = time.monotonic()
            client = Forge(base_url=f"http://127.0.0.1:{server.getsockname()[1]}", token=TOKEN, http_timeout_margin=-4.8)
            self.assertRaises(ForgeTransportError, client.run, "hello", timeout_secs=5)
            self.assertLess(time.monotonic() - begun, 4)

    @responses.activate
    def test_the_token_is_nowhere_to_be_seen(self) -> None:
        responses.post(f"{URL}/admin/tokens", json={"name": "a", "token": "cf_minted", "ip_cidrs": [], "created_at": 1})
        responses.post(f"{URL}/run", status=401, json=PROBLEM)
        client = forge()
        token = client.create_token("a")
        self.assertEqual(token.token, "cf_minted")
        with self.assertRaises(ForgeError) as refused, self.assertLogs(level="DEBUG") as logs:
            import logging

            logging.getLogger().debug("begin")
            client.run("hello")
        with self.assertRaises(ForgeTransportError) as missing:
            Forge(base_url="http://127.0.0.1:1", token=TOKEN).run("hello")
        with self.assertRaises(ValueError) as wrong:
            Forge(base_url=URL, token=TOKEN + "\n")
        session = Session(client, "ab12", "claude")
        shown = [repr(client), str(client), repr(session), repr(token), str(token)]
        shown += [repr(caught.exception) + str(caught.exception) for caught in (refused, missing, wrong)] + logs.output
        for text in shown:
            self.assertNotIn(TOKEN, text)
            self.assertNotIn("cf_minted", text)


class Files(unittest.TestCase):
    def upload(self, *arguments: Any, **options: Any) -> tuple[str, bytes, requests.PreparedRequest]:
        bodies: list[bytes] = []

        def answer(request: requests.PreparedRequest) -> tuple[int, dict[str, str], str]:
            bodies.append(b"".join(cast(Iterator[bytes], request.body)))
            return 200, {}, json.dumps({"ok": True, "file_token": "ff_1", "ttl_secs": 600, "size": 3})

        with responses.RequestsMock() as mock:
            mock.add_callback("POST", f"{URL}/files", callback=answer)
            given = forge().upload_file(*arguments, **options)
            self.assertEqual((given.file_token, given.ttl_secs, given.size), ("ff_1", 600, 3))
            request = mock.calls[0].request
        return cast(str, request.url), bodies[0], request

    def test_a_path_and_a_file_object(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, 'no"te.txt')
            path.write_bytes(b"abc")
            url, body, request = self.upload(path, ttl_secs=600, content_type="text/plain")
            boundary = request.headers["Content-Type"].removeprefix("multipart/form-data; boundary=")
            self.assertEqual(
                body.decode(),
                f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="no%22te.txt"\r\n'
                f"Content-Type: text/plain\r\n\r\nabc\r\n--{boundary}--\r\n",
            )
            self.assertTrue(url.endswith("/files?ttl_secs=600"), url)
            with path.open("rb") as file:
                self.assertIn(b'filename="no%22te.txt"', self.upload(file)[1])
                self.assertFalse(file.closed)
        _, body, _ = self.upload(io.BytesIO(b"xyz"), filename="a\r\nb")
        self.assertIn(b'filename="a%0D%0Ab"\r\nContent-Type: application/octet-stream\r\n\r\nxyz\r\n', body)
        self.assertIn(b'filename="file"', self.upload(io.BytesIO(b""))[1])

    @responses.activate
    def test_what_can_not_be_read_is_not_sent(self) -> None:
        self.assertRaises(FileNotFoundError, forge().upload_file, "/nowhere/at/all")
        self.assertRaises(TypeError, forge().upload_file, io.StringIO("text"))
        self.assertEqual(len(responses.calls), 0)

    def test_a_large_file_is_never_whole_in_memory(self) -> None:
        size = 64 << 20
        with socket.create_server(("127.0.0.1", 0)) as server, tempfile.TemporaryFile() as file:
            file.truncate(size)
            received = 0

            def swallow() -> None:
                nonlocal received
                connection, _ = server.accept()
                with connection:
                    tail = b""
                    while not tail.endswith(b"0\r\n\r\n"):
                        piece = connection.recv(1 << 20)
                        received += len(piece)
                        tail = (tail + piece)[-8:]
                    body = json.dumps({"ok": True, "file_token": "ff_1", "ttl_secs": 60, "size": size})
                    connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())

            thread = threading.Thread(target=swallow)
            thread.start()
            tracemalloc.start()
            self.addCleanup(tracemalloc.stop)
            with Forge(base_url=f"http://127.0.0.1:{server.getsockname()[1]}", token=TOKEN) as client:
                self.assertEqual(client.upload_file(file).size, size)
            thread.join()
            self.assertGreater(received, size)
            self.assertLess(tracemalloc.get_traced_memory()[1], 8 << 20)


class Sessions(unittest.TestCase):
    @responses.activate
    def test_a_turn(self) -> None:
        responses.post(f"{URL}/sessions", json=SESSION)
        events = [{"type": "text", "content": "Good "}, {"type": "tool_call", "content": "no"}, {"type": "text", "content": "day"}]
        responses.post(f"{URL}/sessions/ab12/turn", json=TURN | {"events": events, "text": "…"})
        session = forge().create_session(model="opus", meta={"for": "supper"})
        self.assertEqual(sent(), {"agent": "claude", "model": "opus", "meta": {"for": "supper"}})
        self.assertEqual((session.id, session.agent), ("ab12", "claude"))
        turn = session.turn("hello")
        self.assertEqual((turn.text(), turn.turn_index, turn.events, turn.duration_ms), ("Good day", 1, events, 7))
        self.assertRaises(AttributeError, setattr, turn, "ok", False)
        self.assertEqual((sent(), timeout()), ({"prompt": "hello"}, 630))
        session.turn("hello", files=["ff_1"], timeout_secs=60)
        self.assertEqual((sent(), timeout()), ({"prompt": "hello", "files": ["ff_1"], "timeout_secs": 60}, 90))

    @responses.activate
    def test_cancelling(self) -> None:
        responses.post(f"{URL}/sessions/ab12/cancel", json={"ok": True, "session_id": "ab12", "cancelled": 2})
        self.assertEqual(Session(forge(), "ab12", "claude").cancel(), 2)

    @responses.activate
    def test_closing_twice_sends_one_request(self) -> None:
        responses.delete(f"{URL}/sessions/ab12", json=CLOSED)
        session = Session(forge(), "ab12", "claude")
        threads = [threading.Thread(target=session.close) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(len(responses.calls), 1)

    @responses.activate
    def test_a_close_that_failed_in_transport_can_be_tried_again(self) -> None:
        responses.delete(f"{URL}/sessions/ab12", body=requests.ConnectionError("broken"))
        responses.delete(f"{URL}/sessions/ab12", json=CLOSED)
        session = Session(forge(), "ab12", "claude")
        self.assertRaises(ForgeTransportError, session.close)
        session.close()
        session.close()
        self.assertEqual(len(responses.calls), 2)

    @responses.activate
    def test_with_closes_and_never_masks_the_first_error(self) -> None:
        responses.post(f"{URL}/sessions", json=SESSION)
        responses.delete(f"{URL}/sessions/ab12", json=CLOSED)
        with forge().session():
            pass
        self.assertEqual(responses.calls[-1].request.method, "DELETE")
        with self.assertRaisesRegex(KeyError, "mine"), forge().session():
            raise KeyError("mine")
        self.assertEqual(responses.calls[-1].request.method, "DELETE")
        responses.replace("DELETE", f"{URL}/sessions/ab12", status=500)
        with self.assertRaisesRegex(KeyError, "mine"), forge().session():
            raise KeyError("mine")
        with self.assertRaises(ForgeAPIError), forge().session():
            pass

    @responses.activate
    def test_listing_and_looking(self) -> None:
        responses.get(re.compile(f"{URL}/sessions\\?.*"), json={"sessions": [{"session_id": "ab12"}], "count": 1})
        responses.get(f"{URL}/sessions/a%2Fb", json={"session_id": "a/b"})
        self.assertEqual(forge().list_sessions(include_closed=False), [{"session_id": "ab12"}])
        self.assertTrue(cast(str, responses.calls[0].request.url).endswith("include_closed=false"))
        self.assertEqual(forge().get_session("a/b"), {"session_id": "a/b"})


class Tokens(unittest.TestCase):
    @responses.activate
    def test_the_joined_networks_become_a_list(self) -> None:
        row = {"name": "a", "ip_cidrs": "172.24.0.0/16,10.0.0.0/8", "created_at": 1, "last_used": None, "enabled": True}
        responses.get(f"{URL}/admin/tokens", json={"tokens": [row, row | {"name": "b", "ip_cidrs": "", "enabled": False}], "count": 2})
        first, second = forge().list_tokens()
        self.assertEqual((first.ip_cidrs, first.token, first.enabled), (["172.24.0.0/16", "10.0.0.0/8"], None, True))
        self.assertEqual((second.ip_cidrs, second.enabled), ([], False))

    @responses.activate
    def test_creating_and_revoking(self) -> None:
        created = {"name": "a", "token": "cf_x", "ip_cidrs": ["10.0.0.0/8"], "created_at": 1}
        responses.post(f"{URL}/admin/tokens", json=created)
        responses.delete(f"{URL}/admin/tokens/a%20b", json={"ok": True, "name": "a b"})
        token = forge().create_token("a", ["10.0.0.0/8"])
        self.assertEqual((token.token, token.ip_cidrs, token.last_used, token.enabled), ("cf_x", ["10.0.0.0/8"], None, True))
        self.assertEqual(sent(), {"name": "a", "ip_cidrs": ["10.0.0.0/8"]})
        self.assertIs(forge().revoke_token("a b"), True)


class Connections(unittest.TestCase):
    def test_an_own_session_is_closed_and_a_given_one_left_open(self) -> None:
        class Watched(requests.Session):
            closed = False

            def close(self) -> None:
                self.closed = True
                super().close()

        given = Watched()
        with forge(session=given):
            pass
        self.assertFalse(given.closed)
        self.assertNotIn("Authorization", given.headers)
        own = forge()
        own._http = watched = Watched()
        with own:
            pass
        self.assertTrue(watched.closed)


if __name__ == "__main__":
    unittest.main()

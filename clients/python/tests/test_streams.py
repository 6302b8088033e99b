"""Streams, over the wire."""

from __future__ import annotations

import gc
import json
import socket
import threading
import unittest
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock
from uuid import UUID

from clawdforge import EventStream, Forge, ForgeAPIError, ForgeAuthError, ForgeTransportError, RunResult, Session

RUN = {"ok": True, "result": "héllo", "duration_ms": 5, "stop_reason": "end_turn"}
TURN = {"ok": True, "session_id": "ab12", "turn_index": 2, "events": [], "stop_reason": "end_turn", "duration_ms": 7}
FAILED = {"ok": False, "error": "overloaded", "stderr": "", "duration_ms": 1, "stop_reason": "error"}
PROBLEM = {"type": "about:blank", "title": "Busy", "status": 503, "detail": "Try again."}


@dataclass
class Answer:
    """What is sent for one request. Without an end, a stream breaks off behind its pieces, or ``waits`` for the client."""

    pieces: list[bytes | threading.Event] = field(default_factory=list)
    status: int = 200
    body: dict[str, Any] | None = None
    ends: bool = True
    waits: bool = False


def frame(id: int | None, name: str, data: dict[str, Any], indent: int | None = None) -> bytes:
    lines = [f"data: {line}" for line in json.dumps(data, ensure_ascii=False, indent=indent).splitlines()]
    return "\n".join([*([] if id is None else [f"id: {id}"]), f"event: {name}", ": a comment", *lines, "", ""]).encode()


def text(id: int, content: str) -> bytes:
    return frame(id, "text", {"content": content})


class Streams(unittest.TestCase):
    def setUp(self) -> None:
        self.asked: list[tuple[str, dict[str, str], Any]] = []
        self.left = 0
        self.server = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(self.server.close)
        self.server.settimeout(10)
        self.forge = Forge(base_url=f"http://127.0.0.1:{self.server.getsockname()[1]}", token="cf_x")
        self.addCleanup(self.forge.close)
        sleep = mock.patch("clawdforge.stream.time.sleep")
        self.sleep = sleep.start()
        self.addCleanup(sleep.stop)

    def serve(self, *answers: Answer) -> None:
        def serve() -> None:
            for answer in answers:
                self.answer(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        self.addCleanup(thread.join)

    def answer(self, answer: Answer) -> None:
        connection, _ = self.server.accept()
        with connection, connection.makefile("rwb") as file:
            line = file.readline().decode().removesuffix(" HTTP/1.1\r\n")
            headers = dict(line.decode().strip().split(": ", 1) for line in iter(file.readline, b"\r\n"))
            self.asked.append((line, headers, json.loads(file.read(int(headers.get("Content-Length", 0))) or b"null")))
            head = f"HTTP/1.1 {answer.status} Status\r\nConnection: close\r\n"
            if not answer.pieces:
                body = json.dumps(answer.body or {"ok": True})
                file.write(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
                return
            file.write(f"{head}X-Run-Id: 0a\r\nX-Turn: 2\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
            for piece in answer.pieces:
                if isinstance(piece, threading.Event):
                    piece.wait(10)
                else:
                    file.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                    file.flush()
            if answer.waits:
                self.left += file.read() == b""
            elif answer.ends:
                file.write(b"0\r\n\r\n")

    def requests(self) -> list[str]:
        return [line for line, _, _ in self.asked]

    def run_stream(self, key: str | None = None) -> EventStream[RunResult]:
        return self.forge.run("hi", stream=True, idempotency_key=key)

    def test_a_stream_in_pieces_of_any_size(self) -> None:
        whole = b": heartbeat\n\n" + text(1, "hé") + frame(2, "tool_call", {"name": "Bash", "args": {"a": "\n"}}, indent=1)
        whole += b":\n\n" + frame(3, "text", {"content": "llo"}, indent=1) + frame(None, "gap", {"detail": "Some are missing."})
        whole += frame(4, "result", RUN, indent=2)
        for size in (1, 7, len(whole)):
            self.serve(Answer([whole[at : at + size] for at in range(0, len(whole), size)]))
            stream = self.run_stream()
            with self.assertRaises(ValueError):
                stream.result
            events = list(stream)
            self.assertEqual([event.name for event in events], ["text", "tool_call", "text", "gap", "result"])
            self.assertEqual([event.id for event in events], [1, 2, 3, 3, 4])
            self.assertEqual("".join(event.text for event in events), "héllo")
            self.assertEqual(events[1].data, {"name": "Bash", "args": {"a": "\n"}})
            self.assertEqual((events[-1].data, stream.result), (RUN, RunResult(**RUN)))  # type: ignore[arg-type]
            self.assertEqual((stream.id, list(stream)), ("0a", []))
        self.assertEqual(self.requests(), ["POST /run"] * 3)
        _, headers, body = self.asked[0]
        self.assertEqual((headers["Accept"], headers["Authorization"]), ("text/event-stream", "Bearer cf_x"))
        self.assertEqual(body, {"prompt": "hi", "model": "sonnet", "timeout_secs": 120})
        self.assertEqual(len({UUID(headers["Idempotency-Key"]) for _, headers, _ in self.asked}), 3)

    def test_what_an_agent_asks_is_answered_while_the_stream_goes_on(self) -> None:
        def asked(id: int) -> bytes:
            return frame(id, "permission_request", {"permission_id": f"p{id}", "expires_at": 9})

        gone = Answer(status=410, body={"status": 410, "detail": "It is over."})
        for given, sent in (
            ("allow", {"decision": "allow"}),
            ("allow_always", {"option_id": "allow_always"}),
            ({"decision": "deny", "message": "No."}, {"decision": "deny", "message": "No."}),
        ):
            self.serve(Answer([asked(1), frame(2, "result", RUN)]), gone)
            result = self.forge.run("hi", on_permission=lambda question, given=given: given, permission_timeout_secs=10)  # type: ignore[misc]
            self.assertEqual(result, RunResult(**RUN))  # type: ignore[arg-type]
            (_, _, run), (line, _, body) = self.asked[-2:]
            self.assertEqual((run["permissions"], run["permission_timeout_secs"]), ("ask", 10))
            self.assertEqual((line, body), ("POST /runs/0a/permissions/p1", sent))
        session = Session(self.forge, "ab12", "claude")
        self.serve(Answer([asked(1), frame(2, "result", TURN)]), Answer())
        self.assertEqual(session.turn("hi", on_permission=lambda question: "deny").turn_index, 2)
        self.assertEqual(self.requests()[-1], "POST /sessions/ab12/permissions/p1")

    def test_a_callback_that_raises_cancels_the_work(self) -> None:
        def raises(question: dict[str, Any]) -> str:
            raise KeyError(question["permission_id"])

        self.serve(Answer([frame(1, "permission_request", {"permission_id": "p1"})], waits=True), Answer())
        with self.assertRaises(KeyError):
            self.forge.run("hi", on_permission=raises)
        self.assertEqual(self.requests(), ["POST /run", "DELETE /runs/0a"])

    def test_an_answer_that_is_not_taken_cancels_the_work(self) -> None:
        question = frame(1, "permission_request", {"permission_id": "p/1"})
        refused = Answer(status=422, body={"status": 422, "detail": "The question does not offer that."})
        self.serve(Answer([question]), refused, Answer())
        with self.assertRaises(ForgeAPIError) as caught:
            self.forge.run("hi", on_permission=lambda question: "always")
        self.assertEqual(caught.exception.status_code, 422)
        self.assertEqual(self.requests(), ["POST /run", "POST /runs/0a/permissions/p%2F1", "DELETE /runs/0a"])
        self.serve(Answer([question], waits=True), Answer())
        with self.assertRaises(TypeError):
            self.forge.run("hi", on_permission=lambda question: None)  # type: ignore[arg-type, return-value]
        self.assertEqual(self.requests()[-2:], ["POST /run", "DELETE /runs/0a"])
        with self.assertRaises(ValueError):
            Session(self.forge, "ab12", "claude").answer("..", "allow")

    def test_events_come_as_they_happen(self) -> None:
        seen = threading.Event()
        self.serve(Answer([text(1, "first"), seen, frame(2, "result", RUN)]))
        for event in self.run_stream("mine"):
            seen.set()
            self.assertLess(event.id, 3)
        self.assertEqual(self.asked[0][1]["Idempotency-Key"], "mine")

    def test_a_broken_connection_is_taken_up_with_nothing_lost_or_doubled(self) -> None:
        third = text(3, "c")
        self.serve(
            Answer([text(1, "a"), text(2, "b"), third[:20]], ends=False),
            Answer([third[:-1]], ends=False),
            Answer([b":\n\n"]),
            Answer([third], ends=False),
            Answer([b": nothing yet\n\n"], ends=False),
            Answer([text(4, "d"), frame(5, "result", RUN)]),
        )
        stream = self.run_stream()
        self.assertEqual([(event.id, event.text) for event in stream], [(1, "a"), (2, "b"), (3, "c"), (4, "d"), (5, "")])
        self.assertEqual(stream.result.result, "héllo")
        self.assertEqual(self.requests(), ["POST /run"] + ["GET /runs/0a/events"] * 5)
        self.assertEqual([headers.get("Last-Event-ID") for _, headers, _ in self.asked], [None, "2", "2", "2", "3", "3"])
        self.assertEqual(self.sleep.call_args_list, [mock.call(secs) for secs in (0, 1, 2, 0, 1)])

    def test_one_that_breaks_again_and_again_is_given_up(self) -> None:
        gap = Answer([frame(None, "gap", {"detail": "Some are missing."})])
        self.serve(Answer([text(1, "a")], ends=False), Answer(ends=False, pieces=[b":\n\n"]), gap, gap)
        stream = self.run_stream()
        self.assertRaisesRegex(ForgeTransportError, "the stream ended before its result", list, stream)
        self.assertEqual(list(stream), [])
        self.assertEqual(self.requests(), ["POST /run"] + ["GET /runs/0a/events"] * 3)
        self.serve(Answer([text(1, "a")], ends=False), Answer(status=404, body=PROBLEM | {"status": 404}))
        with self.assertRaises(ForgeAPIError) as gone:
            list(self.run_stream())
        self.assertEqual(gone.exception.status_code, 404)

    def test_a_failure_is_raised_as_without_a_stream(self) -> None:
        for data, status in ((FAILED, 502), (PROBLEM, 503)):
            self.serve(Answer([text(1, "a"), frame(2, "agent_error", {}), frame(3, "error", data)]))
            stream, names = self.run_stream(), []
            with self.assertRaises(ForgeAPIError) as failed:
                names += [event.name for event in iter(lambda: next(stream), None)]
            self.assertEqual((failed.exception.status_code, failed.exception.body), (status, data))
            self.assertEqual(list(stream), [])
        self.serve(Answer(status=401, body=PROBLEM), Answer(body=RUN))
        self.assertRaises(ForgeAuthError, self.run_stream)
        self.assertRaisesRegex(ForgeAPIError, "no stream", self.run_stream)
        self.assertEqual(self.requests(), ["POST /run"] * 4)

    def test_whoever_leaves_cancels(self) -> None:
        def broken_off() -> None:
            for _ in self.run_stream():
                break

        def failing() -> None:
            with self.assertRaises(KeyError):
                for event in self.run_stream():
                    raise KeyError(event.id)

        def closed() -> None:
            stream = self.run_stream()
            next(stream)
            stream.close()
            stream.close()

        def in_with() -> None:
            with self.run_stream() as stream:
                self.assertEqual(next(stream).text, "a")
            self.assertEqual(list(stream), [])

        def never_read() -> None:
            self.run_stream()

        def interrupted() -> None:
            with mock.patch("clawdforge.stream.Event", side_effect=KeyboardInterrupt):
                self.assertRaises(KeyboardInterrupt, list, self.run_stream())

        ways: list[Callable[[], None]] = [broken_off, failing, closed, in_with, never_read, interrupted]
        for way in ways:
            self.asked.clear()
            self.serve(Answer([text(1, "a")], waits=True), Answer(body={"ok": True, "run_id": "0a", "already_over": False}))
            way()
            gc.collect()
            self.assertEqual(self.requests(), ["POST /run", "DELETE /runs/0a"], way.__name__)
        self.assertEqual(self.left, len(ways))

    def test_whoever_leaves_at_the_end_does_not(self) -> None:
        self.serve(Answer([frame(1, "result", RUN)]), Answer([frame(1, "error", FAILED)]))
        with self.run_stream() as stream:
            next(stream)
        with self.run_stream() as stream:
            self.assertRaises(ForgeAPIError, next, stream)
        self.assertEqual(self.requests(), ["POST /run"] * 2)

    def test_a_turn(self) -> None:
        session = Session(self.forge, "ab12", "claude")
        self.serve(
            Answer([text(1, "a")], ends=False),
            Answer([frame(2, "thinking", {"type": "thinking", "content": "hm"}), frame(3, "result", TURN)]),
            Answer([text(1, "a")], waits=True),
            Answer(body={"ok": True, "session_id": "ab12", "cancelled": 1}),
        )
        stream = session.turn("hi", stream=True, timeout_secs=60)
        self.assertEqual([(event.name, event.text) for event in stream], [("text", "a"), ("thinking", ""), ("result", "")])
        self.assertEqual((stream.id, stream.result.turn_index), ("2", 2))
        next(left := session.turn("hi", stream=True))
        left.close()
        self.assertEqual(
            self.requests(),
            ["POST /sessions/ab12/turn", "GET /sessions/ab12/turns/2/events", "POST /sessions/ab12/turn", "DELETE /sessions/ab12/turns/2"],
        )
        self.assertEqual(self.asked[0][2], {"prompt": "hi", "timeout_secs": 60})


if __name__ == "__main__":
    unittest.main()

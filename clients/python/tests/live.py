"""The client against a real server. Run it with tests/with-demo.sh."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
import unittest
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clawdforge import Forge, ForgeAPIError, ForgeAuthError, ForgeTransportError, Session

URL = os.environ["CLAWDFORGE_URL"]


def app(token: str = os.environ["CLAWDFORGE_TOKEN"]) -> Forge:
    return Forge(base_url=URL, token=token)


def operator() -> Forge:
    return Forge(base_url=URL, token=os.environ["CLAWDFORGE_ADMIN_TOKEN"])


def stub(**directive: Any) -> str:
    return "stub: " + json.dumps(directive)


class Live(unittest.TestCase):
    def test_a_batch(self) -> None:
        with app() as forge:
            runs = ({"custom_id": str(number), "prompt": stub(text=f"number {number}")} for number in range(3))
            batch = forge.batches.create(runs)
            self.assertEqual((batch.total, batch.done), (3, False))
            while not forge.batches.get(batch.batch_id).done:
                time.sleep(0.1)
            results = list(forge.batches.results(batch.batch_id))
            self.assertEqual([result.seq for result in results], [1, 2, 3])
            self.assertEqual({result.custom_id: result.answer and result.answer["result"] for result in results}, {str(n): f"number {n}" for n in range(3)})
            self.assertEqual(list(forge.batches.results(batch.batch_id, after=2)), results[2:])
            self.assertIn(batch.batch_id, [known.batch_id for known in forge.batches.list()])
            with self.assertRaisesRegex(ForgeAPIError, "line 2: a prompt is needed"):
                forge.batches.create([{"prompt": "a"}, {"prompt": ""}])
            slow = forge.batches.create([{"prompt": stub(delay_ms=60000)}] * 5)
            cancelled = forge.batches.cancel(slow.batch_id)
            self.assertEqual((cancelled.status, cancelled.counts["cancelled"]), ("cancelled", 5))

    def test_health(self) -> None:
        with app() as forge:
            self.assertTrue(forge.healthz()["ok"])

    def test_a_run_gives_text_or_a_value(self) -> None:
        with app() as forge:
            run = forge.run("Say hello.")
            self.assertIsInstance(run.result, str)
            self.assertEqual((run.ok, run.stop_reason), (True, "end_turn"))
            self.assertGreater(run.duration_ms, 0)
            self.assertEqual(forge.run(stub(text='```json\n{"answer": 42}\n```')).result, {"answer": 42})
            request = forge.run(stub(echo=True), model="haiku", system="Mind the gap.", timeout_secs=60).result
            self.assertIn("haiku", request["model"])
            self.assertIn("Mind the gap.", json.dumps(request["system"]))

    def test_a_run_is_watched(self) -> None:
        said = "A heron stands in the water, grey and héron-like, until it doesn't."
        with app() as forge:
            stream = forge.run(stub(text=said, pace_ms=50), stream=True)
            times = [(time.monotonic(), event) for event in stream]
            texts = [event.text for _, event in times if event.name == "text"]
            self.assertEqual(("".join(texts), len(texts) > 2), (said, True))
            self.assertGreater(times[len(texts) - 1][0] - times[0][0], 0.1)
            self.assertEqual([event.id for _, event in times], list(range(1, len(times) + 1)))
            self.assertEqual((times[-1][1].name, stream.result.result), ("result", said))
            with self.assertRaises(ForgeAPIError) as failed:
                list(forge.run(stub(error=401), stream=True))
            self.assertEqual((failed.exception.status_code, forge.get_run(stream.id).result), (502, said))

    def test_a_run_that_is_left_is_cancelled(self) -> None:
        with app() as forge:
            with forge.run(stub(text="long " * 100, pace_ms=200), stream=True) as stream:
                next(stream)
            state = forge.get_run(stream.id)
            self.assertEqual((state.status, state.done, state.stop_reason), ("cancelled", True, "cancelled"))

    def test_a_run_in_the_background(self) -> None:
        with app() as forge:
            key = str(uuid.uuid4())
            state = forge.submit(stub(text="[1, 2]"), idempotency_key=key)
            self.assertEqual(forge.submit(stub(text="[1, 2]"), idempotency_key=key).run_id, state.run_id)
            while not state.done:
                time.sleep(0.05)
                state = forge.get_run(state.run_id)
            self.assertEqual((state.status, state.result, state.error), ("succeeded", [1, 2], None))
            self.assertIs(forge.cancel(state.run_id), False)
            long = forge.submit(stub(delay_ms=20_000))
            self.assertIs(forge.cancel(long.run_id), True)
            self.assertEqual(forge.get_run(long.run_id).status, "cancelled")

    def test_a_key_runs_once(self) -> None:
        with app() as forge:
            key = str(uuid.uuid4())
            first = forge.run("Say hello.", idempotency_key=key)
            self.assertEqual(forge.run("Say hello.", idempotency_key=key), first)
            with forge.run("Say hello.", idempotency_key=key, stream=True) as stream:
                self.assertEqual(list(stream)[-1].data["duration_ms"], first.duration_ms)
            with self.assertRaises(ForgeAPIError) as other:
                forge.run("Say something else.", idempotency_key=key)
            self.assertEqual(other.exception.status_code, 422)

    def test_an_upload_reaches_a_run(self) -> None:
        with app() as forge:
            file = forge.upload_file(io.BytesIO(b"the cellar door"), filename='a "quoted" näme.txt', ttl_secs=600)
            self.assertEqual((file.size, file.ttl_secs), (15, 600))
            request = forge.run(stub(echo=True), files=[file.file_token]).result
            self.assertIn("näme.txt", json.dumps(request, ensure_ascii=False))
            self.assertEqual(forge.upload_file(__file__).size, Path(__file__).stat().st_size)

    def test_too_large_a_file_is_a_413(self) -> None:
        limit = 100 << 20
        with app() as forge, open(os.devnull, "rb") as empty:
            self.assertEqual(forge.upload_file(empty).size, 0)

            class Endless(io.RawIOBase):
                given = 0

                def read(self, size: int = -1) -> bytes:
                    self.given += size
                    return b"" if self.given > 2 * limit else bytes(size)

            with self.assertRaises(ForgeAPIError) as large:
                forge.upload_file(Endless())  # type: ignore[arg-type]
            self.assertEqual(large.exception.status_code, 413)

    def test_errors_in_the_servers_words(self) -> None:
        with app() as forge:
            calls: list[tuple[int, Callable[[], object]]] = [
                (502, lambda: forge.run(stub(error=401))),
                (422, lambda: forge.run("hello", timeout_secs=1)),
                (422, lambda: forge.run("hello", model="-x")),
                (400, lambda: forge.run("hello", files=["ff_unknown"])),
                (400, lambda: forge.upload_file(io.BytesIO(b"x"), ttl_secs=1)),
                (404, lambda: forge.get_session("0" * 32)),
                (404, lambda: forge.get_run("0" * 32)),
                (404, lambda: forge.cancel("0" * 32)),
                (422, lambda: forge.run("hello", timeout_secs=1, stream=True)),
                (404, lambda: Session(forge, "0" * 32, "claude").turn("hello")),
                (403, forge.list_tokens),
            ]
            for status, call in calls:
                with self.assertRaises(ForgeAPIError) as caught:
                    call()
                error = caught.exception
                self.assertEqual(error.status_code, status, str(error))
                self.assertIsInstance(error.body, dict)
                self.assertGreater(len(error.message), 20)
            with self.assertRaisesRegex(ForgeAPIError, "timeout_secs"):
                forge.run("hello", timeout_secs=1)
        self.assertRaises(ForgeAuthError, app("cf_unknown").run, "hello")
        self.assertRaises(ForgeAuthError, operator().run, "hello")
        self.assertRaises(ForgeTransportError, Forge(base_url="http://127.0.0.1:1", token="cf_x").run, "hello")

    def test_a_session_remembers_and_closes(self) -> None:
        with app() as forge:
            with forge.session(model="haiku", meta={"for": "supper"}) as session:
                first = session.turn("My name is Mio.")
                self.assertEqual((first.turn_index, first.stop_reason, first.session_id), (1, "end_turn", session.id))
                second = session.turn(stub(echo=True), timeout_secs=120)
                self.assertIn("My name is Mio.", second.text())
                self.assertEqual(session.state()["turn_count"], 2)
                self.assertIn(session.id, [listed["session_id"] for listed in forge.list_sessions(include_closed=False)])
            self.assertFalse(session.state()["live"])
            self.assertNotIn(session.id, [listed["session_id"] for listed in forge.list_sessions(include_closed=False)])
            self.assertIn(session.id, [listed["session_id"] for listed in forge.list_sessions()])
            with self.assertRaises(ForgeAPIError) as closed:
                session.turn("More?")
            self.assertEqual(closed.exception.status_code, 410)
            session.close()
            Session(forge, session.id, "claude").close()

    def test_a_tool_call_is_among_the_events(self) -> None:
        with app() as forge, forge.session() as session:
            tool = {"name": "Bash", "input": {"command": "echo from-the-tool", "description": "test"}}
            turn = session.turn(stub(tool=tool))
            calls = [event for event in turn.events if event["type"] == "tool_call"]
            self.assertEqual([call["name"] for call in calls], ["Bash"])
            self.assertIn("from-the-tool", turn.text())
            with self.assertRaises(ForgeAPIError) as failed:
                session.turn(stub(error=400))
            self.assertEqual(failed.exception.status_code, 502)
            self.assertEqual(session.turn("And now?").turn_index, 2)

    def test_a_turn_is_watched(self) -> None:
        said = "Plums ripen late, and quinces later still."
        with app() as forge, forge.session() as session:
            stream = session.turn(stub(text=said, pace_ms=50), stream=True)
            events = list(stream)
            self.assertEqual("".join(event.text for event in events), said)
            self.assertEqual([event.id for event in events], list(range(1, len(events) + 1)))
            self.assertEqual([event.data for event in events[:-1]], stream.result.events)
            self.assertEqual((stream.id, stream.result.turn_index, stream.result.text()), ("1", 1, said))
            with self.assertRaises(ForgeAPIError) as failed:
                list(session.turn(stub(error=400), stream=True))
            self.assertEqual(failed.exception.status_code, 502)

    def test_a_turn_is_cancelled_and_the_session_goes_on(self) -> None:
        long = stub(text="long " * 100, pace_ms=200)
        with app() as forge, forge.session() as session:
            with session.turn(long, stream=True) as left:
                next(event for event in left if event.text)
            self.assertEqual(session.cancel(), 0)
            stream = session.turn(long, stream=True)
            next(event for event in stream if event.text)
            self.assertEqual(session.cancel(), 1)
            with self.assertRaises(ForgeAPIError) as cancelled:
                list(stream)
            body = cancelled.exception.body
            self.assertEqual(body["stop_reason"] if isinstance(body, dict) else body, "cancelled")
            self.assertEqual(session.turn("And now?").turn_index, 1)

    def test_an_agent_asks(self) -> None:
        with app() as forge, forge.session(model="haiku", permissions="ask", permission_timeout_secs=60) as session:
            questions: list[dict[str, Any]] = []

            def answer(question: dict[str, Any]) -> str:
                questions.append(question)
                self.assertEqual([open["permission_id"] for open in session.permissions()], [question["permission_id"]])
                return "allow"

            file = Path(session.state()["cwd"]) / "a"
            turn = session.turn(stub(tool={"name": "Write", "input": {"file_path": str(file), "content": "text"}}), on_permission=answer)
            self.assertEqual((turn.stop_reason, len(questions), file.read_text()), ("end_turn", 1, "text"))
            self.assertEqual(session.answer(questions[0]["permission_id"], "allow")["by"], "client")
            tool = {"name": "Bash", "input": {"command": "touch b", "description": "test"}}
            run = forge.run(stub(tool=tool), on_permission=lambda question: {"decision": "deny", "message": "Not today."})
            self.assertIn("Not today.", run.result)

    def test_a_key_makes_one_turn(self) -> None:
        with app() as forge, forge.session() as session:
            key = str(uuid.uuid4())
            first = session.turn("hello", idempotency_key=key)
            self.assertEqual(session.turn("hello", idempotency_key=key), first)

    def test_a_key_makes_one_session(self) -> None:
        with app() as forge:
            key = str(uuid.uuid4())
            made = forge.create_session(idempotency_key=key)
            self.assertEqual(forge.create_session(idempotency_key=key).id, made.id)
            made.close()

    def test_a_schema_decides_what_the_result_is(self) -> None:
        schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
        answer = stub(tool={"name": "StructuredOutput", "input": {"n": 42}})
        with app() as forge:
            self.assertEqual(forge.run(answer, schema=schema).result, {"n": 42})
            stream = forge.run(answer, schema=schema, stream=True)
            self.assertEqual(list(stream)[-1].data["result"], {"n": 42})
            with self.assertRaises(ForgeAPIError) as wrong:
                forge.run("hello", schema={"type": 5})
            self.assertEqual(wrong.exception.status_code, 422)

    def test_tokens(self) -> None:
        with operator() as forge:
            created = forge.create_token("python", ["127.0.0.0/8", "10.0.0.0/8"])
            self.assertEqual(app(str(created.token)).run("hello").ok, True)
            (listed,) = [token for token in forge.list_tokens() if token.name == "python"]
            self.assertEqual((listed.ip_cidrs, listed.token, listed.enabled), (["127.0.0.0/8", "10.0.0.0/8"], None, True))
            with self.assertRaises(ForgeAPIError) as taken:
                forge.create_token("python")
            self.assertEqual(taken.exception.status_code, 409)
            self.assertTrue(forge.revoke_token("python"))
            self.assertRaises(ForgeAuthError, app(str(created.token)).run, "hello")
            with self.assertRaises(ForgeAPIError) as unknown:
                forge.revoke_token("nobody")
            self.assertEqual(unknown.exception.status_code, 404)

    def test_the_examples_run(self) -> None:
        examples = sorted(Path(__file__).parent.parent.joinpath("examples").glob("*.py"))
        self.assertEqual(len(examples), 3)
        for example in examples:
            ran = subprocess.run([sys.executable, "-W", "error", example], capture_output=True, text=True, check=False)
            self.assertEqual((ran.returncode, ran.stderr), (0, ""), example.name)
            self.assertIn("The model stub read a prompt", ran.stdout)


if __name__ == "__main__":
    unittest.main()

"""OpenAI's own library for Python: chat completions and responses."""

import json
import time
import unittest

import httpx
import openai
from openai import OpenAI
from pydantic import BaseModel

from stub import (
    ECHO, LEGS, PDF, PNG, STEPS, TOKEN, URL, WEATHER, call, check_cancelled, check_steps, document, image, reached, count, spent_token, text, told,
)

client = OpenAI(base_url=f"{URL}/v1", api_key=TOKEN)
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": WEATHER, "strict": True}}
RESPONSE_TOOL = {"type": "function", "name": "get_weather", "description": "Weather", "parameters": WEATHER, "strict": True}
HISTORY = [
    {"role": "system", "content": "You are Mio."},
    {"role": "user", "content": "/hi"},
    {"role": "assistant", "content": "hello"},
]


class Legs(BaseModel):
    legs: int


def ask(prompt, **options):
    return client.chat.completions.create(model="sonnet", messages=[{"role": "user", "content": prompt}], **options)


class Chat(unittest.TestCase):
    def test_plain(self):
        asked = [*HISTORY, {"role": "user", "content": ECHO}, {"role": "developer", "content": "Be brief."}]
        answer = client.chat.completions.create(model="sonnet", messages=asked, max_tokens=99, stop=["END"], temperature=0.2)
        request, system, messages = reached(answer.choices[0].message.content)
        self.assertEqual(system, "You are Mio.\n\nBe brief.")
        # A leading slash that the CLI would take for a command may have a line before it.
        self.assertEqual([(role, [block["text"].lstrip("\n") for block in blocks]) for role, blocks in messages],
                         [("user", ["/hi"]), ("assistant", ["hello"]), ("user", [ECHO])])
        self.assertEqual((request["max_tokens"], request["stop_sequences"], request.get("tools", [])), (99, ["END"], []))
        self.assertEqual(request.get("thinking", {"type": "disabled"}), {"type": "disabled"})
        self.assertEqual(answer.choices[0].finish_reason, "stop")
        self.assertGreater(answer.usage.prompt_tokens, 0)
        self.assertGreater(answer.usage.completion_tokens, 0)

    def test_streamed(self):
        words = "It is a long way to the sea, and a longer one back. " * 3
        stream = ask(told(text=words, thinking="Let me see. " * 3, pace_ms=5), stream=True, stream_options={"include_usage": True}, reasoning_effort="low")
        chunks = list(stream)
        pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
        thought = [getattr(chunk.choices[0].delta, "reasoning_content", None) for chunk in chunks if chunk.choices]
        self.assertEqual("".join(pieces), words)
        self.assertEqual("".join(filter(None, thought)), "Let me see. " * 3)
        self.assertGreater(len(pieces), 5)
        self.assertEqual(chunks[0].choices[0].delta.role, "assistant")
        self.assertEqual(chunks[-2].choices[0].finish_reason, "stop")
        self.assertGreater(chunks[-1].usage.total_tokens, 0)

    def test_three_steps_with_tools(self):
        for streamed in (False, True):
            messages = [{"role": "user", "content": told(tools=STEPS, echo=True)}]
            for calls in (2, 1, 0):
                options = {"model": "sonnet", "messages": messages, "tools": [TOOL]}
                if streamed:
                    with client.chat.completions.stream(**options) as stream:
                        answer = stream.get_final_completion()
                else:
                    answer = client.chat.completions.create(**options)
                message = answer.choices[0].message
                self.assertEqual(len(message.tool_calls or []), calls)
                self.assertEqual(answer.choices[0].finish_reason, "tool_calls" if calls else "stop")
                messages.append(message.model_dump(exclude_none=True))
                for called in message.tool_calls or []:
                    city = json.loads(called.function.arguments)["city"]
                    messages.append({"role": "tool", "tool_call_id": called.id, "content": f"rain in {city}"})
            check_steps(self, message.content)

    def test_choice_and_many_tools(self):
        many = [{"type": "function", "function": {"name": f"light.turn-on_{at}", "strict": at == 0, "parameters": {"type": "object", "properties": {"z": {}, "a": {}}}}}
                for at in range(100)]
        answer = ask(ECHO, tools=many, tool_choice="required", parallel_tool_calls=False)
        request, _, _ = reached(answer.choices[0].message.content)
        self.assertEqual([tool["name"] for tool in request["tools"]], [f"light.turn-on_{at}" for at in range(100)])
        self.assertEqual(list(request["tools"][0]["input_schema"]["properties"]), ["z", "a"])
        self.assertEqual([tool.get("strict") for tool in request["tools"][:2]], [True, None])
        self.assertEqual(request["tool_choice"], {"type": "any", "disable_parallel_tool_use": True})

    def test_legacy_functions(self):
        function = {"name": "get_weather", "parameters": WEATHER}
        messages = [{"role": "user", "content": told(tools=STEPS[1:], echo=True)}]
        answer = client.chat.completions.create(model="sonnet", messages=messages, functions=[function])
        called = answer.choices[0].message.function_call
        self.assertEqual((called.name, answer.choices[0].finish_reason), ("get_weather", "function_call"))
        messages.append({"role": "assistant", "content": None, "function_call": {"name": called.name, "arguments": called.arguments}})
        messages.append({"role": "function", "name": "get_weather", "content": "rain"})
        answer = client.chat.completions.create(model="sonnet", messages=messages, functions=[function])
        _, _, sent = reached(answer.choices[0].message.content)
        self.assertEqual(sent[1][1][0]["input"], {"city": "Bonn"})
        self.assertEqual(sent[2][1][0]["tool_use_id"], sent[1][1][0]["id"])

    def test_image_and_pdf(self):
        content = [
            {"type": "text", "text": ECHO},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}},
            {"type": "file", "file": {"filename": "a.pdf", "file_data": f"data:application/pdf;base64,{PDF}"}},
        ]
        _, _, messages = reached(ask(content).choices[0].message.content)
        self.assertEqual(messages, [("user", [text(ECHO), image(), document()])])

    def test_json_schema(self):
        answer = client.chat.completions.parse(
            model="sonnet", messages=[{"role": "user", "content": told(text='{"legs": 8}')}], response_format=Legs)
        self.assertEqual(answer.choices[0].message.parsed, Legs(legs=8))
        schema = {"type": "json_schema", "json_schema": {"name": "legs", "strict": True, "schema": LEGS}}
        request, _, _ = reached(ask(ECHO, response_format=schema).choices[0].message.content)
        self.assertEqual(request["output_config"]["format"], {"type": "json_schema", "schema": LEGS})

    def test_json_object(self):
        fenced = told(text='```json\n{"legs": 8}\n```', pace_ms=1)
        self.assertEqual(ask(fenced, response_format={"type": "json_object"}).choices[0].message.content, '{"legs": 8}')
        stream = ask(fenced, response_format={"type": "json_object"}, stream=True)
        self.assertEqual("".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices), '{"legs": 8}')

    def test_cancel(self):
        stream = ask(told(bytes=4000, pace_ms=20), stream=True)
        next(iter(stream))
        stream.close()
        check_cancelled(self)

    def test_ends_and_limits(self):
        for stop_reason, finish in (("max_tokens", "length"), ("refusal", "content_filter"), ("stop_sequence", "stop")):
            answer = ask(told(text="cut", stop_reason=stop_reason))
            self.assertEqual((answer.choices[0].finish_reason, answer.choices[0].message.content), (finish, "cut"))

    def test_errors(self):
        before = count()
        for status, error in ((400, openai.BadRequestError), (404, openai.NotFoundError), (429, openai.RateLimitError),
                              (529, openai.InternalServerError), (500, openai.InternalServerError)):
            with self.assertRaises(error) as raised:
                ask(told(error=status))
            self.assertTrue(raised.exception.request_id.startswith("req_"))
        # The server's own sign-in is not the caller's.
        with self.assertRaises(openai.InternalServerError) as raised:
            ask(told(error=401))
        self.assertIn("operator", str(raised.exception))
        # Each was asked once: what was begun is not begun again.
        self.assertEqual(count() - before, 6)
        with self.assertRaises(openai.AuthenticationError):
            OpenAI(base_url=f"{URL}/v1", api_key="cf_no").models.list()
        for wrong, param in (({"n": 2}, "n"), ({"seed": 1}, "seed"), ({"logprobs": True}, "logprobs"), ({"extra_body": {"nope": 1}}, "nope")):
            with self.assertRaises(openai.BadRequestError) as raised:
                ask("hi", **wrong)
            self.assertEqual(raised.exception.param, param)
        with self.assertRaises(openai.BadRequestError) as raised:
            ask([{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}])
        self.assertIn("data: URL", str(raised.exception))
        with self.assertRaises(openai.RateLimitError) as raised:
            OpenAI(base_url=f"{URL}/v1", api_key=spent_token()).chat.completions.create(
                model="sonnet", messages=[{"role": "user", "content": "hi"}])
        self.assertEqual(raised.exception.code, "insufficient_quota")

    def test_an_error_in_mid_stream(self):
        with self.assertRaises(openai.APIError):
            for _ in ask(told(bytes=4000, pace_ms=1, cut=True), stream=True):
                pass

    def test_a_retry_joins_what_goes_on(self):
        before = count()
        slow = told(text="slow", delay_ms=2500)
        answer = client.with_options(timeout=1.5, max_retries=3).chat.completions.create(
            model="sonnet", messages=[{"role": "user", "content": slow}])
        self.assertEqual(answer.choices[0].message.content, "slow")
        self.assertEqual(count() - before, 1)

    def test_a_key_leads_to_one_run(self):
        before, key = count(), str(time.time_ns())
        answers = [ask("once", extra_headers={"Idempotency-Key": key}) for _ in range(2)]
        self.assertEqual(answers[0].id, answers[1].id)
        pieces = [list(ask("twice", stream=True, extra_headers={"Idempotency-Key": key + "s"})) for _ in range(2)]
        self.assertEqual(*([chunk.choices[0].delta.content for chunk in stream] for stream in pieces))
        self.assertEqual(count() - before, 2)

    def test_what_has_no_effect_is_named(self):
        answer = client.chat.completions.with_raw_response.create(
            model="sonnet", messages=[{"role": "user", "content": "hi"}], temperature=0.5, user="me")
        self.assertEqual(answer.headers["x-clawdforge-no-effect"], "temperature, user")

    def test_models(self):
        names = [model.id for model in client.models.list()]
        for name in ("sonnet", "opus", "haiku"):
            self.assertIn(name, names)
        self.assertEqual(client.models.retrieve("sonnet").id, "sonnet")
        with self.assertRaises(openai.NotFoundError):
            client.models.retrieve("gpt-4o")


class Responses(unittest.TestCase):
    def test_plain(self):
        asked = [*HISTORY[1:], {"role": "developer", "content": "Be brief."}, {"role": "user", "content": ECHO}]
        answer = client.responses.create(model="sonnet", input=asked, instructions="You are Mio.", max_output_tokens=99, metadata={"a": "b"})
        request, system, messages = reached(answer.output_text)
        self.assertEqual(system, "You are Mio.\n\nBe brief.")
        self.assertEqual([(role, [block["text"].lstrip("\n") for block in blocks]) for role, blocks in messages],
                         [("user", ["/hi"]), ("assistant", ["hello"]), ("user", [ECHO])])
        self.assertEqual((request["max_tokens"], answer.metadata, answer.status), (99, {"a": "b"}, "completed"))
        self.assertGreater(answer.usage.total_tokens, 0)

    def test_streamed(self):
        words = "It is a long way to the sea, and a longer one back. " * 3
        with client.responses.stream(model="sonnet", input=told(text=words, thinking="Hm. " * 8, pace_ms=5), reasoning={"effort": "low"}) as stream:
            events = list(stream)
            answer = stream.get_final_response()
        self.assertEqual("".join(event.delta for event in events if event.type == "response.output_text.delta"), words)
        self.assertEqual("".join(event.delta for event in events if event.type == "response.reasoning_summary_text.delta"), "Hm. " * 8)
        self.assertEqual([event.sequence_number for event in events], list(range(len(events))))
        self.assertEqual((answer.output_text, [item.type for item in answer.output]), (words, ["reasoning", "message"]))
        self.assertEqual([item.id for item in client.responses.retrieve(answer.id).output], [item.id for item in answer.output])

    def test_three_steps_with_tools(self):
        # Told by what came before, by references to it, and whole.
        for way in ("previous", "references", "whole"):
            items, previous = [{"role": "user", "content": told(tools=STEPS, echo=True)}], None
            for calls in (2, 1, 0):
                answer = client.responses.create(model="sonnet", input=items, tools=[RESPONSE_TOOL], previous_response_id=previous)
                called = [item for item in answer.output if item.type == "function_call"]
                self.assertEqual(len(called), calls)
                given = [{"type": "function_call_output", "call_id": item.call_id, "output": f"rain in {json.loads(item.arguments)['city']}"}
                         for item in called]
                if way == "previous":
                    items, previous = given, answer.id
                elif way == "references":
                    items = items + [{"type": "item_reference", "id": item.id} for item in answer.output] + given
                else:
                    items = items + [item.model_dump() for item in answer.output] + given
            check_steps(self, answer.output_text)

    def test_image_and_pdf(self):
        content = [
            {"type": "input_text", "text": ECHO},
            {"type": "input_image", "image_url": f"data:image/png;base64,{PNG}"},
            {"type": "input_file", "filename": "a.pdf", "file_data": f"data:application/pdf;base64,{PDF}"},
        ]
        _, _, messages = reached(client.responses.create(model="sonnet", input=[{"role": "user", "content": content}]).output_text)
        self.assertEqual(messages, [("user", [text(ECHO), image(), document()])])

    def test_json_schema(self):
        answer = client.responses.parse(model="sonnet", input=told(text='{"legs": 8}'), text_format=Legs)
        self.assertEqual(answer.output_parsed, Legs(legs=8))
        answer = client.responses.create(
            model="sonnet", input=ECHO, text={"format": {"type": "json_schema", "name": "legs", "strict": True, "schema": LEGS}})
        request, _, _ = reached(answer.output_text)
        self.assertEqual(request["output_config"]["format"], {"type": "json_schema", "schema": LEGS})

    def test_cancel(self):
        stream = client.responses.create(model="sonnet", input=told(bytes=4000, pace_ms=20), stream=True)
        for event in stream:
            if event.type == "response.output_text.delta":
                break
        stream.close()
        check_cancelled(self)

    def test_what_is_kept_and_what_is_not(self):
        kept = client.responses.create(model="sonnet", input="one")
        self.assertEqual(client.responses.retrieve(kept.id).output_text, kept.output_text)
        client.responses.delete(kept.id)
        gone = client.responses.create(model="sonnet", input="two", store=False)
        for name in (kept.id, gone.id, "resp_" + "0" * 32, "nonsense"):
            with self.assertRaises(openai.NotFoundError):
                client.responses.retrieve(name)
            with self.assertRaises(openai.BadRequestError) as raised:
                client.responses.create(model="sonnet", input="three", previous_response_id=name)
            self.assertEqual(raised.exception.code, "previous_response_not_found")

    def test_another_apps_response_is_not_there(self):
        kept = client.responses.create(model="sonnet", input="one")
        other = call("POST", "/admin/tokens", {"name": f"other-{time.time_ns()}"}, token=__import__("stub").ADMIN)["token"]
        with self.assertRaises(openai.NotFoundError):
            OpenAI(base_url=f"{URL}/v1", api_key=other).responses.retrieve(kept.id)

    def test_an_incomplete_one(self):
        answer = client.responses.create(model="sonnet", input=told(text="cut", stop_reason="max_tokens"))
        self.assertEqual((answer.status, answer.incomplete_details.reason), ("incomplete", "max_output_tokens"))

    def test_errors(self):
        for status, error in ((400, openai.BadRequestError), (429, openai.RateLimitError), (500, openai.InternalServerError)):
            with self.assertRaises(error):
                client.responses.create(model="sonnet", input=told(error=status))
        for wrong, param in (({"background": True}, "background"), ({"truncation": "auto"}, "truncation"), ({"conversation": "c"}, "conversation"),
                             ({"tools": [{"type": "web_search"}]}, "tools.0.type")):
            with self.assertRaises(openai.BadRequestError) as raised:
                client.responses.create(model="sonnet", input="hi", **wrong)
            self.assertEqual(raised.exception.param, param)


class Wire(unittest.TestCase):
    """What libraries don't show."""

    def test_every_refusal_is_in_the_vendors_form(self):
        headers = {"Authorization": f"Bearer {TOKEN}"}
        for answer in (
            httpx.post(f"{URL}/v1/chat/completions", headers=headers, content="{", timeout=30),
            httpx.post(f"{URL}/v1/chat/completions", headers={**headers, "Content-Type": "application/json"}, content="{", timeout=30),
            httpx.get(f"{URL}/v1/nothing", headers=headers, timeout=30),
            httpx.delete(f"{URL}/v1/models", headers=headers, timeout=30),
        ):
            self.assertGreaterEqual(answer.status_code, 400)
            self.assertEqual(set(answer.json()["error"]), {"message", "type", "param", "code"})
            self.assertTrue(answer.headers["x-request-id"].startswith("req_"))


if __name__ == "__main__":
    unittest.main()

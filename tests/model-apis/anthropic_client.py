"""Anthropic's own library for Python."""

import json
import unittest

import anthropic
from anthropic import Anthropic, beta_tool
from pydantic import BaseModel

from stub import (
    ECHO, LEGS, STEPS, TOKEN, URL, WEATHER, check_cancelled, check_steps, document, image, kinds, reached, count, spent_token, text, told,
)

# As an app would, with the key that the library sends by itself.
client = Anthropic(base_url=URL, api_key=TOKEN)
TOOL = {"name": "get_weather", "description": "Weather", "input_schema": WEATHER}


class Legs(BaseModel):
    legs: int


def ask(content, **options):
    return client.messages.create(model="sonnet", max_tokens=500, messages=[{"role": "user", "content": content}], **options)


class Messages(unittest.TestCase):
    def test_plain(self):
        said = [{"role": "user", "content": "/hi"}, {"role": "assistant", "content": "hello"}, {"role": "user", "content": ECHO}]
        answer = client.messages.create(model="sonnet", max_tokens=99, system="You are Mio.", messages=said, stop_sequences=["END"])
        request, system, messages = reached(answer.content[0].text)
        self.assertEqual(system, "You are Mio.")
        self.assertEqual([(role, [block["text"].lstrip("\n") for block in blocks]) for role, blocks in messages],
                         [("user", ["/hi"]), ("assistant", ["hello"]), ("user", [ECHO])])
        self.assertEqual((request["max_tokens"], request["stop_sequences"], answer.stop_reason), (99, ["END"], "end_turn"))
        self.assertGreater(answer.usage.input_tokens, 0)
        self.assertTrue(answer._request_id.startswith("req_"))

    def test_streamed(self):
        words = "It is a long way to the sea, and a longer one back. " * 3
        thinking = {"type": "enabled", "budget_tokens": 1024}
        said = [{"role": "user", "content": told(text=words, thinking="Let me see. " * 3, pace_ms=5)}]
        with client.messages.stream(model="sonnet", max_tokens=2000, thinking=thinking, messages=said) as stream:
            events = list(stream)
            answer = stream.get_final_message()
        pieces = [event.text for event in events if event.type == "text"]
        self.assertEqual("".join(pieces), words)
        self.assertGreater(len(pieces), 5)
        self.assertEqual([block.type for block in answer.content], ["thinking", "text"])
        self.assertEqual(answer.content[0].thinking, "Let me see. " * 3)
        self.assertTrue(answer.content[0].signature)
        self.assertEqual([event.type for event in events].count("message_stop"), 1)
        # The model gets back what it thought, as it signed it, and as it was asked.
        said += [{"role": "assistant", "content": answer.content}, {"role": "user", "content": ECHO}]
        request, _, messages = reached(
            client.messages.create(model="sonnet", max_tokens=2000, thinking=thinking, messages=said).content[0].text)
        self.assertEqual(kinds(messages)[1], ("assistant", ["thinking", "text"]))
        self.assertEqual(messages[1][1][0]["signature"], answer.content[0].signature)
        self.assertEqual(request["thinking"], thinking)

    def test_three_steps_with_tools(self):
        for streamed in (False, True):
            messages = [{"role": "user", "content": told(tools=STEPS, echo=True)}]
            for calls in (2, 1, 0):
                options = {"model": "sonnet", "max_tokens": 500, "messages": messages, "tools": [TOOL]}
                if streamed:
                    with client.messages.stream(**options) as stream:
                        answer = stream.get_final_message()
                else:
                    answer = client.messages.create(**options)
                called = [block for block in answer.content if block.type == "tool_use"]
                self.assertEqual((len(called), answer.stop_reason), (calls, "tool_use" if calls else "end_turn"))
                messages.append({"role": "assistant", "content": answer.content})
                messages.append({"role": "user", "content": [
                    {"type": "tool_result", "tool_use_id": block.id, "content": f"rain in {block.input['city']}"} for block in called]})
            check_steps(self, answer.content[0].text)

    def test_tool_runner(self):
        @beta_tool
        def get_weather(city: str) -> str:
            """Weather.

            Args:
                city: the town
            """
            return f"rain in {city}"

        runner = client.beta.messages.tool_runner(
            model="sonnet", max_tokens=500, tools=[get_weather], messages=[{"role": "user", "content": told(tools=STEPS, echo=True)}])
        check_steps(self, runner.until_done().content[0].text)

    def test_choice_and_many_tools(self):
        many = [{"name": f"light.turn-on_{at}", "input_schema": {"type": "object", "properties": {"z": {}, "a": {}}}} for at in range(100)]
        choice = {"type": "tool", "name": "light.turn-on_7"}
        request, _, _ = reached(ask(ECHO, tools=many, tool_choice=choice).content[0].text)
        self.assertEqual([tool["name"] for tool in request["tools"]], [f"light.turn-on_{at}" for at in range(100)])
        self.assertEqual(list(request["tools"][0]["input_schema"]["properties"]), ["z", "a"])
        self.assertEqual(request["tool_choice"], choice)

    def test_image_and_pdf(self):
        _, _, messages = reached(ask([text(ECHO), image(), document()]).content[0].text)
        self.assertEqual(messages, [("user", [text(ECHO), image(), document()])])

    def test_a_tool_that_gives_an_image(self):
        call = {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {}}
        result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [text("there"), image()], "is_error": False}
        said = [{"role": "user", "content": "look"}, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result, text(ECHO)]}]
        answer = client.messages.create(model="sonnet", max_tokens=50, messages=said)
        # The stub answers a tool's result with the result.
        self.assertEqual(answer.stop_reason, "end_turn")
        _, _, messages = reached(answer.content[0].text)
        self.assertEqual(messages[2][1][0]["content"], [text("there"), image()])

    def test_json_schema(self):
        parsed = client.messages.parse(
            model="sonnet", max_tokens=50, messages=[{"role": "user", "content": told(text='{"legs": 8}')}], output_format=Legs)
        self.assertEqual(parsed.parsed_output, Legs(legs=8))
        format = {"type": "json_schema", "schema": LEGS}
        request, _, _ = reached(ask(ECHO, output_config={"format": format, "effort": "low"}).content[0].text)
        self.assertEqual(request["output_config"], {"format": format, "effort": "low"})

    def test_cancel(self):
        with client.messages.stream(model="sonnet", max_tokens=9, messages=[{"role": "user", "content": told(bytes=4000, pace_ms=20)}]) as stream:
            next(iter(stream.text_stream))
        check_cancelled(self)

    def test_ends(self):
        for stop_reason in ("max_tokens", "refusal"):
            answer = ask(told(text="cut", stop_reason=stop_reason))
            self.assertEqual((answer.stop_reason, answer.content[0].text), (stop_reason, "cut"))

    def test_errors(self):
        before = count()
        for status, error in ((400, anthropic.BadRequestError), (404, anthropic.NotFoundError), (413, anthropic.RequestTooLargeError),
                              (429, anthropic.RateLimitError), (500, anthropic.InternalServerError), (529, anthropic.InternalServerError)):
            with self.assertRaises(error) as raised:
                ask(told(error=status))
            self.assertEqual(raised.exception.body["type"], "error")
        self.assertEqual(count() - before, 6)
        with self.assertRaises(anthropic.AuthenticationError):
            Anthropic(base_url=URL, api_key="cf_no").models.list()
        with self.assertRaises(anthropic.RateLimitError):
            Anthropic(base_url=URL, api_key=spent_token()).messages.create(
                model="sonnet", max_tokens=9, messages=[{"role": "user", "content": "hi"}])
        for wrong, said in (({"extra_body": {"top_k": 5}}, "top_k"), ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type"),
                            ({"extra_body": {"nope": 1}}, "nope"), ({"extra_body": {"mcp_servers": [{}]}}, "mcp_servers")):
            with self.assertRaises(anthropic.BadRequestError) as raised:
                ask("hi", **wrong)
            self.assertIn(said, str(raised.exception))
        for source in ({"type": "url", "url": "https://example.org/a.png"}, {"type": "file", "file_id": "file_1"}):
            with self.assertRaises(anthropic.BadRequestError) as raised:
                ask([{"type": "image", "source": source}])
            self.assertIn("fetches nothing", str(raised.exception))
        with self.assertRaises(anthropic.BadRequestError) as raised:
            client.messages.create(model="sonnet", max_tokens=9, messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "{"}])
        self.assertIn("messages.1", str(raised.exception))

    def test_an_error_in_mid_stream(self):
        with self.assertRaises(anthropic.APIStatusError):
            with client.messages.stream(
                    model="sonnet", max_tokens=9, messages=[{"role": "user", "content": told(bytes=4000, pace_ms=1, cut=True)}]) as stream:
                list(stream)

    def test_models_and_tokens(self):
        names = [model.id for model in client.models.list()]
        self.assertIn("sonnet", names)
        self.assertEqual(client.models.retrieve("haiku").type, "model")
        few = client.messages.count_tokens(model="sonnet", messages=[{"role": "user", "content": "hi"}])
        many = client.messages.count_tokens(model="sonnet", messages=[{"role": "user", "content": "hi " * 4000}], tools=[TOOL])
        self.assertLess(few.input_tokens, 50)
        self.assertTrue(2000 < many.input_tokens < 5000, many)
        self.assertTrue(json.loads(many.model_dump_json())["estimated"])


if __name__ == "__main__":
    unittest.main()

"""LiteLLM over either vendor's API."""

import json
import os
import unittest

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network for prices
import litellm

from stub import ECHO, LEGS, PDF, PNG, STEPS, TOKEN, URL, WEATHER, check_cancelled, check_steps, document, image, reached, text, told

TOOL = {"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": WEATHER}}


class LiteLLM:
    def ask(self, content, **options):
        messages = options.pop("messages", [{"role": "user", "content": content}])
        return litellm.completion(**self.to, messages=messages, max_tokens=500, **options)

    def test_plain(self):
        said = [{"role": "system", "content": "You are Mio."}, {"role": "user", "content": ECHO}]
        answer = self.ask(None, messages=said)
        _, system, messages = reached(answer.choices[0].message.content)
        self.assertEqual((system, messages), ("You are Mio.", [("user", [text(ECHO)])]))
        self.assertGreater(answer.usage.prompt_tokens, 0)

    def test_streamed(self):
        words = "It is a long way to the sea, and a longer one back. " * 3
        pieces = [chunk.choices[0].delta.content or "" for chunk in self.ask(told(text=words, pace_ms=5), stream=True)]
        self.assertEqual("".join(pieces), words)
        self.assertGreater(len(pieces), 5)

    def test_three_steps_with_tools(self):
        messages = [{"role": "user", "content": told(tools=STEPS, echo=True)}]
        for calls in (2, 1, 0):
            message = self.ask(None, messages=messages, tools=[TOOL]).choices[0].message
            self.assertEqual(len(message.tool_calls or []), calls)
            messages.append(message.model_dump(exclude_none=True))
            for called in message.tool_calls or []:
                city = json.loads(called.function.arguments)["city"]
                messages.append({"role": "tool", "tool_call_id": called.id, "content": f"rain in {city}"})
        check_steps(self, message.content)

    def test_image_and_pdf(self):
        content = [
            {"type": "text", "text": ECHO},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}},
            {"type": "file", "file": {"filename": "a.pdf", "file_data": f"data:application/pdf;base64,{PDF}"}},
        ]
        _, _, messages = reached(self.ask(content).choices[0].message.content)
        self.assertEqual(messages, [("user", [text(ECHO), image(), document()])])

    def test_cancel(self):
        stream = self.ask(told(bytes=4000, pace_ms=20), stream=True)
        next(iter(stream))
        self.leave(stream)
        check_cancelled(self)

    def test_errors(self):
        for status, error in ((400, litellm.BadRequestError), (429, litellm.RateLimitError), (404, litellm.NotFoundError)):
            with self.assertRaises(error):
                self.ask(told(error=status), num_retries=0)


class OverChatCompletions(LiteLLM, unittest.TestCase):
    to = {"model": "openai/sonnet", "api_base": f"{URL}/v1", "api_key": TOKEN}

    def leave(self, stream):
        stream.completion_stream.close()

    def test_json_schema(self):
        format = {"type": "json_schema", "json_schema": {"name": "legs", "strict": True, "schema": LEGS}}
        request, _, _ = reached(self.ask(ECHO, response_format=format).choices[0].message.content)
        self.assertEqual(request["output_config"]["format"]["schema"], LEGS)

    def test_responses(self):
        answer = litellm.responses(**self.to, input=told(text="hello"))
        self.assertEqual(answer.output_text, "hello")


class OverMessages(LiteLLM, unittest.TestCase):
    to = {"model": "anthropic/claude-sonnet-4-5", "api_base": URL, "api_key": TOKEN}

    def leave(self, stream):
        stream.completion_stream.response_iterator.close() if hasattr(stream.completion_stream, "response_iterator") else None

    def test_json_schema(self):
        format = {"type": "json_schema", "json_schema": {"name": "legs", "strict": True, "schema": LEGS}}
        for directive in ({"text": '{"legs": 8}'}, {"tool": {"name": "json_tool_call", "input": {"legs": 8}}}):
            answer = self.ask(told(**directive), response_format=format).choices[0].message.content
            self.assertEqual(json.loads(answer), {"legs": 8})


if __name__ == "__main__":
    unittest.main()

"""LangChain over either vendor's API."""

import unittest

import anthropic
import openai
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from stub import ECHO, PDF, PNG, STEPS, TOKEN, URL, check_cancelled, check_steps, document, image, reached, text, told


class Legs(BaseModel):
    """How many legs it has."""

    legs: int


@tool
def get_weather(city: str) -> str:
    """Weather of a town."""
    return f"rain in {city}"


class LangChain:
    def test_plain(self):
        answer = self.model.invoke([SystemMessage("You are Mio."), HumanMessage(ECHO)])
        _, system, messages = reached(answer.text)
        self.assertEqual((system, messages), ("You are Mio.", [("user", [text(ECHO)])]))
        self.assertGreater(answer.usage_metadata["input_tokens"], 0)

    def test_streamed(self):
        words = "It is a long way to the sea, and a longer one back. " * 3
        pieces = [chunk.text for chunk in self.model.stream(told(text=words, pace_ms=5))]
        self.assertEqual("".join(pieces), words)
        self.assertGreater(len(pieces), 5)

    def test_three_steps_with_tools(self):
        model, messages = self.model.bind_tools([get_weather]), [HumanMessage(told(tools=STEPS, echo=True))]
        for calls in (2, 1, 0):
            answer = model.invoke(messages)
            self.assertEqual(len(answer.tool_calls), calls)
            messages += [answer, *(ToolMessage(get_weather.invoke(called["args"]), tool_call_id=called["id"]) for called in answer.tool_calls)]
        check_steps(self, answer.text)

    def test_image_and_pdf(self):
        content = [
            {"type": "text", "text": ECHO},
            {"type": "image", "base64": PNG, "mime_type": "image/png"},
            {"type": "file", "base64": PDF, "mime_type": "application/pdf", "filename": "a.pdf"},
        ]
        _, _, messages = reached(self.model.invoke([HumanMessage(content=content)]).text)
        self.assertEqual(messages, [("user", [text(ECHO), image(), document()])])

    def test_cancel(self):
        stream = self.model.stream(told(bytes=4000, pace_ms=20))
        next(stream)
        stream.close()
        check_cancelled(self)

    def test_errors(self):
        for status, error in self.errors.items():
            with self.assertRaises(error):
                self.model.invoke(told(error=status))


class OverChatCompletions(LangChain, unittest.TestCase):
    model = ChatOpenAI(base_url=f"{URL}/v1", api_key=TOKEN, model="sonnet")
    errors = {400: openai.BadRequestError, 429: openai.RateLimitError, 529: openai.InternalServerError}

    def test_json_schema(self):
        answer = self.model.with_structured_output(Legs).invoke(told(text='{"legs": 8}'))
        self.assertEqual(answer, Legs(legs=8))


class OverResponses(OverChatCompletions):
    model = ChatOpenAI(base_url=f"{URL}/v1", api_key=TOKEN, model="sonnet", use_responses_api=True)


class OverMessages(LangChain, unittest.TestCase):
    model = ChatAnthropic(base_url=URL, api_key=TOKEN, model="sonnet", max_tokens=500)
    errors = {400: anthropic.BadRequestError, 429: anthropic.RateLimitError, 529: anthropic.InternalServerError}

    def test_json_schema(self):
        answer = self.model.with_structured_output(Legs).invoke(told(tool={"name": "Legs", "input": {"legs": 8}}))
        self.assertEqual(answer, Legs(legs=8))


if __name__ == "__main__":
    unittest.main()

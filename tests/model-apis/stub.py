"""What the tests of all clients share: where the server is, what the model stub is told, and what reached it."""

import base64
import json
import os
import time
import urllib.request

URL = os.environ["CLAWDFORGE_URL"]
TOKEN = os.environ["CLAWDFORGE_TOKEN"]
ADMIN = os.environ["CLAWDFORGE_ADMIN_TOKEN"]

PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAEklEQVR4nGP4z8CAFWEXHbQSACj/P8Fu7N9hAAAAAElFTkSuQmCC"
)
PDF = base64.b64encode(b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n%%EOF\n").decode()
LEGS = {
    "type": "object",
    "properties": {"legs": {"type": "integer"}},
    "required": ["legs"],
    "additionalProperties": False,
}
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
# Two calls at once, then one, then the whole request as the answer.
STEPS = [
    [{"name": "get_weather", "input": {"city": "Oslo"}}, {"name": "get_weather", "input": {"city": "Rome"}}],
    [{"name": "get_weather", "input": {"city": "Bonn"}}],
]


def told(**directive):
    """A prompt that decides what the model does."""
    return f"stub: {json.dumps(directive)}"


ECHO = told(echo=True)


def call(method, path, body=None, token=TOKEN):
    request = urllib.request.Request(URL + path, method=method, headers={"Authorization": f"Bearer {token}"})
    if body is not None:
        request.data = json.dumps(body).encode()
        request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())


def newest():
    """The app's newest run."""
    return call("GET", "/runs?limit=1")["runs"][0]


def count():
    """How many runs the app has had today."""
    return sum(usage["runs"] for usage in call("GET", "/usage")["usage"])


def wait_for(what, condition, secs=20):
    deadline = time.monotonic() + secs
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"no {what} within {secs} s")
        time.sleep(0.05)


def reached(text):
    """What a reply that echoes the request says of it, without what the CLI says of itself."""
    request = json.loads(text)
    # The first two blocks name the CLI.
    system = "".join(block["text"] for block in request["system"][2:])
    messages = []
    for message in request["messages"]:
        # Later releases of the CLI say what day it is, and where it runs, beside the conversation; earlier ones in its first message.
        if message["role"] == "system":
            continue
        content = message["content"]
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        kept = [
            {key: value for key, value in block.items() if key != "cache_control"}
            for block in blocks
            if not block.get("text", "").startswith("<system-reminder>")
        ]
        messages.append((message["role"], kept))
    return request, system, messages


def text(words):
    return {"type": "text", "text": words}


def image():
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}


def document():
    return {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": PDF}}


def kinds(messages):
    return [(role, [block["type"] for block in blocks]) for role, blocks in messages]


# What the conversation of STEPS looks like when the model is asked the last time.
STEPS_REACHED = [
    ("user", ["text"]),
    ("assistant", ["tool_use", "tool_use"]),
    ("user", ["tool_result", "tool_result"]),
    ("assistant", ["tool_use"]),
    ("user", ["tool_result"]),
]


def check_steps(test, echoed):
    """That three steps with tools reached the model call by call."""
    request, _, messages = reached(echoed)
    test.assertEqual(kinds(messages), STEPS_REACHED)
    test.assertEqual([tool["name"] for tool in request["tools"]], ["get_weather"])
    calls = [block for role, blocks in messages if role == "assistant" for block in blocks]
    results = [block for role, blocks in messages[1:] if role == "user" for block in blocks]
    test.assertEqual([block["input"] for block in calls], [{"city": "Oslo"}, {"city": "Rome"}, {"city": "Bonn"}])
    test.assertEqual([block["id"] for block in calls], [block["tool_use_id"] for block in results])
    given = [block["content"] if isinstance(block["content"], str) else block["content"][0]["text"] for block in results]
    # To some models the CLI says where it runs at the end of a tool's result.
    given = [result.split("\n\n<system-reminder>")[0] for result in given]
    test.assertEqual(given, ["rain in Oslo", "rain in Rome", "rain in Bonn"])


def spent_token():
    """A token of an app that may spend nothing."""
    name = f"spent-{time.time_ns()}"
    return call("POST", "/admin/tokens", {"name": name, "daily_usd": 0}, token=ADMIN)["token"]


def check_cancelled(test):
    """That the newest run is over without an answer, with its processes."""
    wait_for("run that is over", lambda: newest()["status"] not in ("queued", "running"))
    test.assertEqual(newest()["status"], "cancelled")
    wait_for("end of its processes", lambda: completions() <= STANDBYS)


# Idle processes that the server keeps, of all kinds together.
STANDBYS = 2


def completions():
    """How many processes there are that ask the model for a completion, or wait to."""
    count = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as command:
                count += b"--max-budget-usd" in command.read().split(b"\0")
        except OSError:
            pass
    return count

"""Client of clawdforge, which runs the claude CLI for the apps on your network."""

from . import webhooks
from .batches import Batch, Batches, BatchResult
from .client import Forge
from .errors import ForgeAPIError, ForgeAuthError, ForgeError, ForgeTransportError
from .results import AppToken, Event, FileToken, RunResult, RunState, TurnResult
from .session import Session
from .stream import EventStream
from .webhooks import WebhookError

__all__ = [
    "AppToken",
    "Batch",
    "BatchResult",
    "Batches",
    "Event",
    "EventStream",
    "FileToken",
    "Forge",
    "ForgeAPIError",
    "ForgeAuthError",
    "ForgeError",
    "ForgeTransportError",
    "RunResult",
    "RunState",
    "Session",
    "TurnResult",
    "WebhookError",
    "webhooks",
]

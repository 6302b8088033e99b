"""Client of clawdforge, which runs the claude CLI for the apps on your network."""

from .client import Forge
from .errors import ForgeAPIError, ForgeAuthError, ForgeError, ForgeTransportError
from .results import AppToken, FileToken, RunResult, TurnResult
from .session import Session

__all__ = [
    "AppToken",
    "FileToken",
    "Forge",
    "ForgeAPIError",
    "ForgeAuthError",
    "ForgeError",
    "ForgeTransportError",
    "RunResult",
    "Session",
    "TurnResult",
]

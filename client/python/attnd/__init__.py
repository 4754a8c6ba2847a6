"""Client of attnd, the attention microservice.

    with attnd.Client("127.0.0.1:7700", timeout=5.0) as client:
        result = client.attend(query, key, value, is_causal=True)

`attnd.errors` lists what a call raises, `attnd.api` the messages of the control plane,
`attnd.testing` runs a server for tests.
"""

from attnd import api, errors
from attnd._version import __version__
from attnd.aio import AsyncClient, AsyncStream
from attnd.client import Client, HealthStatus
from attnd.errors import AttndError
from attnd.results import AttentionResult, Execution
from attnd.sessions import Session
from attnd.stream import Stream, StreamCall

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "AttentionResult",
    "AttndError",
    "Client",
    "Execution",
    "HealthStatus",
    "Session",
    "Stream",
    "StreamCall",
    "__version__",
    "api",
    "errors",
]

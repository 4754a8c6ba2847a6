"""A session: one sequence's key/value cache on the server, as an object with safe retries."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

from attnd import _channel, _requests
from attnd._proto.attention.v1 import attention_pb2
from attnd.arguments import AttendArguments, ForwardArguments, Kind
from attnd.results import AttentionResult
from attnd.tensors import AnyTensor, TensorT

if TYPE_CHECKING:
    from attnd.client import Client

_Place = tuple[str, int, Kind]  # stack, layer, kind: what has a cache, and steps, of its own


@dataclass
class _LayerState:
    length: int = 0  # as last told
    step: int = 0  # of the last call that the server is known to have done


class Session:
    """Opened by `Client.open_session`, closed with its context.

    `attend` and `forward` are the client's for this one row. They number the calls that change a
    layer's cache and make a call again under the same number when its answer was lost on the way,
    so that a token is never appended twice. A call that failed in the end counts as not made: the
    next one has its number, and replaces what the server may have done of it (but for its cut).

    Calls of several threads run one after the other. Only one object may number a session's calls:
    who shares a session passes `sessions=[...]` and steps of his own to the client.
    """

    def __init__(self, client: Client, session_id: str, model: str = "") -> None:
        self._client = client
        self._layers: dict[_Place, _LayerState] = {}
        self._lock = threading.RLock()
        self.id = session_id
        self.model = model

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        # Who has the id has the session: no more of it than the control plane shows.
        return f"Session({self.id[:8]}..., model={self.model!r})"

    def close(self, *, timeout: float | None = None) -> None:
        """Frees the cache; one that has expired or was closed before is no error."""
        self._client.close_session(self, timeout=timeout)

    def length(self, layer: int = 0, *, stack: str = "", kind: Kind = "self") -> int:
        """Tokens in the layer's cache, as the server last told this object."""
        state = self._layers.get((stack, layer, kind))
        return 0 if state is None else state.length

    def get(self, *, timeout: float | None = None) -> attention_pb2.GetSessionResponse:
        """What the server holds; `length` is right again after it, whatever went wrong before."""
        with self._lock:
            response = self._client.get_session(self, timeout=timeout)
            self.learn(response)
            return response

    def learn(self, response: attention_pb2.GetSessionResponse) -> None:
        """Takes over lengths and steps as the server has them."""
        with self._lock:
            self.model = response.model
            self._layers = {
                (cache.stack, cache.layer, _requests.kind_name(cache.kind)): _LayerState(
                    cache.length, cache.last_step
                )
                for cache in response.layers
            }

    def fork(
        self, count: int = 1, length: int | None = None, *, timeout: float | None = None
    ) -> list[Session]:
        """Sessions that share this one's first `length` tokens, or all, and go on by themselves."""
        with self._lock:
            ids = self._client.fork_session(self, count=count, length=length, timeout=timeout)
            return [self._child(fork, length) for fork in ids]

    def attend(
        self,
        query: TensorT,
        key: AnyTensor | None = None,
        value: AnyTensor | None = None,
        *,
        retries: int = 2,
        timeout: float | None = None,
        **arguments: Unpack[AttendArguments],
    ) -> AttentionResult[TensorT]:
        """`Client.attend` for this session's row, made again up to `retries` times.

        `timeout` is that of all attempts together.
        """

        def call(arguments: AttendArguments, timeout: float | None) -> AttentionResult[TensorT]:
            return self._client.attend(query, key, value, timeout=timeout, **arguments)

        return self._numbered(call, arguments, retries, timeout)

    def forward(
        self,
        hidden_states: TensorT,
        *,
        retries: int = 2,
        timeout: float | None = None,
        **arguments: Unpack[ForwardArguments],
    ) -> AttentionResult[TensorT]:
        """`Client.forward` for this session's row and model, made again as `attend` is."""

        def call(arguments: ForwardArguments, timeout: float | None) -> AttentionResult[TensorT]:
            return self._client.forward(hidden_states, timeout=timeout, **arguments)

        return self._numbered(call, arguments, retries, timeout)

    def _numbered(
        self,
        call: Callable[[Any, float | None], AttentionResult[TensorT]],
        given: Mapping[str, Any],
        retries: int,
        timeout: float | None,
    ) -> AttentionResult[TensorT]:
        arguments = {"model": self.model, **given, "sessions": [self]}
        place = (
            arguments.get("stack", ""),
            arguments.get("layer", 0),
            arguments.get("kind", "self"),
        )
        timeout = self._client.timeout if timeout is None else timeout
        with self._lock:
            state = self._layers.get(place, _LayerState())
            changes = arguments.get("cache_mode", "append") == "append"
            if changes:
                arguments.setdefault("step", state.step + 1)
            result = _channel.with_retries(
                lambda left: call(arguments, left), retries=retries, timeout=timeout
            )
            step = _only(arguments["step"]) if changes else state.step
            self._layers[place] = _LayerState(result.cache_length[0], step)
            return result

    def _child(self, session_id: str, length: int | None) -> Session:
        child = Session(self._client, session_id, self.model)
        for place, state in self._layers.items():
            shared = state.length
            if length is not None and place[2] == "self":
                shared = min(length, shared)
            child._layers[place] = _LayerState(shared, state.step)
        return child


def _only(step: int | Sequence[int]) -> int:
    return step[0] if isinstance(step, Sequence) else step

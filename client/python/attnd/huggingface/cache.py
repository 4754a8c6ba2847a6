"""A cache of transformers whose keys and values are in sessions of the server.

Its layers keep nothing: `update` hands the new tokens on, marked, and the attention function, which
finds the mark, sends them to be appended and attended to in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, cast

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from attnd import _channel
from attnd.arguments import AttendArguments
from attnd.client import Client
from attnd.huggingface.masks import MaskDescription, Pattern
from attnd.huggingface.rows import Rows, checked_matrix, described_rows, packed
from attnd.results import AttentionResult

_MARK = "_attnd_tokens"
_registered: Client | None = None
_NO_COLUMNS = torch.zeros(0, 0, dtype=torch.bool)


def use_by_default(client: Client) -> None:
    global _registered
    _registered = client


class SessionCache(Cache):
    """For `past_key_values`: each row of the batch has a session, over all layers.

    `client` is that of the last `register` where none is given.
    Sessions are opened when the first tokens come, of no model or of `model`, which must be the one
    that runs here: its layers' windows then let tokens go. Beams fork them, `crop` cuts them, and
    they are closed with the context. The other arguments are those of `Client.open_session`;
    `retries` and `timeout` are of every call, which a lost answer does not append twice.

    Padding is not cached. The padding mask of a later call must say the same of earlier tokens.
    Positions are the model's: those of the tokens without the padding, as generate() makes them.
    As the cross-attention half of an EncoderDecoderCache it serves too.
    """

    def __init__(
        self,
        client: Client | None = None,
        *,
        model: str = "",
        reserve_tokens: int = 0,
        time_to_live: float = 0.0,
        cache_dtype: object = None,
        rollback_tokens: int = 0,
        retries: int = 2,
        timeout: float | None = None,
    ) -> None:
        self._own: list[SessionLayer] = []
        super().__init__(layers=cast(Any, self._own))
        if client is None and _registered is None:
            raise RuntimeError("a SessionCache needs a client: call attnd.huggingface.register")
        self.client = client = cast(Client, client or _registered)
        self.model = model
        self._open_arguments: dict[str, Any] = {
            "reserve_tokens": reserve_tokens,
            "time_to_live": time_to_live,
            "cache_dtype": cache_dtype,
            "rollback_tokens": rollback_tokens,
        }
        self._retries = retries
        self._timeout = client.timeout if timeout is None else timeout
        self._sessions: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __deepcopy__(self, memo: object) -> SessionCache:
        return self.fork()

    @property
    def sessions(self) -> tuple[str, ...]:
        """Ids, one per row."""
        return tuple(self._sessions)

    def close(self) -> None:
        """Closes the sessions. The cache is empty then, and may be used again."""
        sessions, self._sessions = self._sessions, []
        self._own.clear()
        for session in sessions:
            self.client.close_session(session)

    def reset(self) -> None:
        self.close()

    def fork(self) -> SessionCache:
        """A cache of forks, which goes on by itself: several answers to one long prompt."""
        copy = SessionCache(
            self.client,
            model=self.model,
            retries=self._retries,
            timeout=self._timeout,
            **self._open_arguments,
        )
        forks = self._fork(dict.fromkeys(range(len(self._sessions)), 1))
        copy._sessions = [forks[row][0] for row in range(len(self._sessions))]
        copy._own += [SessionLayer(copy, layer.index, layer) for layer in self._own]
        return copy

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *arguments: Any,
        **named: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        while len(self._own) <= layer_idx:
            self._own.append(SessionLayer(self, len(self._own)))
        return self._own[layer_idx].update(key_states, value_states)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row beam_idx[i] was, in all layers at once."""
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select(torch.arange(len(self._sessions))[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select([row for row in range(len(self._sessions)) for _ in range(repeats)])

    def sessions_for(self, batch: int) -> list[str]:
        """One for each row, opened where there is none yet: all of them, or none."""
        if not self._sessions:
            opened: list[str] = []
            try:
                for _ in range(batch):
                    opened.append(self.client.open_session(self.model, **self._open_arguments).id)
            except BaseException:
                self._discard(opened)
                raise
            self._sessions = opened
        if len(self._sessions) != batch:
            raise ValueError(f"a batch of {batch} rows for a cache of {len(self._sessions)}")
        return self._sessions

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        arguments: AttendArguments,
    ) -> AttentionResult[torch.Tensor]:
        return _channel.with_retries(
            lambda left: self.client.attend(query, key, value, timeout=left, **arguments),
            retries=self._retries,
            timeout=self._timeout,
        )

    def _select(self, rows: Sequence[int]) -> None:
        """The first to take a row over keeps its session, others get forks of it."""
        if not self._sessions or list(rows) == list(range(len(self._sessions))):
            return
        extra = {row: rows.count(row) - 1 for row in rows}
        forks = self._fork(extra)
        heirs = {row: [self._sessions[row], *forks.get(row, [])] for row in extra}
        dropped = [session for row, session in enumerate(self._sessions) if row not in heirs]
        self._sessions = [heirs[row].pop(0) for row in rows]
        for layer in self._own:
            layer.kept = layer.kept[list(rows)]
        self._discard(dropped)

    def _fork(self, counts: dict[int, int]) -> dict[int, list[str]]:
        forks: dict[int, list[str]] = {}
        try:
            for row, count in counts.items():
                if count:
                    session = self._sessions[row]
                    forks[row] = self.client.fork_session(session, count=count)
        except BaseException:
            self._discard([fork for made in forks.values() for fork in made])
            raise
        return forks

    def _discard(self, sessions: Sequence[str]) -> None:
        for session in sessions:
            self.client.close_session(session)


class SessionLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """What is known here of one layer's cache: how many columns it has, and which are tokens."""

    is_croppable = True
    supports_early_init = False
    is_sliding = False

    def __init__(self, cache: SessionCache, index: int, before: SessionLayer | None = None) -> None:
        """`before` is what a fork goes on from."""
        self.cache = cache
        self.index = index
        # bool [batch, columns], on the CPU: columns of padding are counted here and not there.
        self.kept: torch.Tensor = _NO_COLUMNS if before is None else before.kept
        self.step: int = 0 if before is None else before.step  # of the last call that appended
        self.is_cut: bool = (
            before is not None and before.is_cut
        )  # here, and there with the next call
        self.is_initialized = False
        self._is_awaited = False
        self._nothing: tuple[torch.Tensor, torch.Tensor] | None = (
            None if before is None else before._nothing
        )

    # Cross-attention asks for these once they are cached: no tokens, marked.

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        return None if self._nothing is None else _marked(self._nothing[0], NewTokens(self))

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        return None if self._nothing is None else _marked(self._nothing[1], NewTokens(self))

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """There is nothing to allocate."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._is_awaited:
            raise RuntimeError(
                f"layer {self.index} did not hand what update returned to attnd's attention "
                'function: does the model have attn_implementation="attnd"?'
            )
        self._is_awaited = True
        self._nothing = (key_states[:, :, :0].detach(), value_states[:, :, :0].detach())
        tokens = NewTokens(self, (key_states, value_states))
        return _marked(key_states, tokens), _marked(value_states, tokens)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return int(self.kept.shape[1])

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Takes a negative number of columns, as transformers' own layers do; 0: nothing."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give the columns to remove as -n")
        if tokens_to_remove < 0 and self.get_seq_length():
            self.kept = self.kept[:, :tokens_to_remove]
            self.is_cut = True

    def reset(self) -> None:
        raise NotImplementedError("a SessionCache is reset as a whole")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        raise NotImplementedError(
            "a SessionCache is reordered as a whole: a session has all layers"
        )

    def arrived(self) -> None:
        self._is_awaited = False


@dataclass(frozen=True)
class NewTokens:
    """The mark: what an attention function was given comes from this layer's `update`."""

    layer: SessionLayer
    states: tuple[torch.Tensor, torch.Tensor] | None = None  # None: it only asks

    def rows(
        self,
        query: torch.Tensor,
        mask: MaskDescription | torch.Tensor | None,
        *,
        is_self_attention: bool,
    ) -> Rows:
        """Columns of keys are all that are cached, then the new ones."""
        layer = self.layer
        batch, q_len = query.shape[0], query.shape[2]
        before = layer.kept if len(layer.kept) else torch.zeros(batch, 0, dtype=torch.bool)
        if len(before) != batch:
            raise ValueError(f"a batch of {batch} rows for a cache of {len(before)}")
        past, new = before.shape[1], 0 if self.states is None else self.states[0].shape[2]
        if isinstance(mask, MaskDescription):
            if (mask.q_length, mask.kv_offset, mask.kv_length) != (q_len, 0, past + new):
                raise ValueError(
                    f"the mask is of {mask.kv_length} keys from {mask.kv_offset} on, the cache of "
                    f"layer {layer.index} has {past} and {new} are new: is it the model's only one?"
                )
            rows = described_rows(mask, is_self_attention=is_self_attention, from_cache=True)
            if not torch.equal(rows.keys[:, :past], before):
                raise ValueError("the padding mask differs from the one of tokens in the cache")
            return rows
        keys = torch.cat([before, torch.ones(batch, new, dtype=torch.bool)], dim=1)
        queries = torch.ones(batch, q_len, dtype=torch.bool)
        if mask is not None:
            matrix = checked_matrix(mask, q_len, past + new)
            return Rows(queries, keys, Pattern(), matrix=matrix)
        if new > 1 and past:
            raise ValueError(f"{new} tokens after {past} come without a mask: are they causal?")
        return Rows(queries, keys, Pattern())

    def attend(
        self, query: torch.Tensor, rows: Rows, arguments: AttendArguments
    ) -> AttentionResult[torch.Tensor]:
        layer, cache = self.layer, self.layer.cache
        past = layer.get_seq_length()
        lengths: list[int] = rows.keys[:, :past].sum(1).tolist()
        new = rows.keys[:, past:]
        arguments = {
            **arguments,
            "model": cache.model,
            "layer": layer.index,
            "sessions": cache.sessions_for(len(rows.keys)),
            "cache_position": lengths,
        }
        if layer.is_cut:
            arguments["truncate"] = lengths
        if self.states is None:
            arguments["cache_mode"] = "read_only"
            return cache.attend(query, None, None, arguments)
        arguments |= {"step": layer.step + 1, "kv_lengths": new.sum(1).tolist()}
        key, value = (packed(states, new) for states in self.states)
        result = cache.attend(query, key, value, arguments)
        layer.step += 1
        layer.kept = rows.keys
        layer.is_cut = False
        return result


def claim(key: torch.Tensor, value: torch.Tensor) -> NewTokens | None:
    """What a SessionCache has marked; None: the keys and values are all there are."""
    marks = getattr(key, _MARK, None), getattr(value, _MARK, None)
    if marks == (None, None):
        return None
    of_key, of_value = marks
    if of_key is None or of_value is None or of_key.layer is not of_value.layer:
        raise ValueError("keys and values are of different caches")
    of_key.layer.arrived()
    tokens: NewTokens = of_key
    return tokens


def _marked(tensor: torch.Tensor, tokens: NewTokens) -> torch.Tensor:
    view = tensor.view_as(tensor)  # the model's own tensor is left as it was
    setattr(view, _MARK, tokens)
    return view

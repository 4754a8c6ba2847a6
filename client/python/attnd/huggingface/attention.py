"""The attention function: what transformers' layers call instead of a kernel."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from attnd.arguments import AttendArguments
from attnd.client import Client
from attnd.huggingface import cache as session_cache
from attnd.huggingface.masks import MaskDescription, Pattern, describe
from attnd.huggingface.rows import (
    Rows,
    all_rows,
    checked_matrix,
    described_rows,
    packed,
    padded,
)
from attnd.results import AttentionResult

# Keyword arguments of models that do not change what attention computes: some are acted on before
# it (positions are in queries and keys already, token types in the mask), some after it.
_WITHOUT_EFFECT = frozenset(
    {
        "cache_position",
        "deterministic",
        "labels",
        "logits_to_keep",
        "mm_token_type_ids",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "token_type_ids",
        "use_cache",
    }
)


def register(
    address: str, model: str | None = None, *, name: str = "attnd", **client_options: Any
) -> Client:
    """Makes `attn_implementation="attnd"` of any transformers model the server at `address`.

    `model` names a hosted one whose active implementation is to do the work, which then has this
    model's layers; None: what the server does without a model. The client is returned, to be
    closed, and is a SessionCache's by default; `client_options` are its arguments. Registering
    again replaces.

    Layers whose attention takes what the server does not know raise NotImplementedError, and so
    does training: nothing flows back through a server.
    """
    client = Client(address, **client_options)
    function = functools.partial(_attention, client, model or "")
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, describe)
    session_cache.use_by_default(client)
    return client


def _attention(
    client: Client,
    model: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: MaskDescription | torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **named: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """query is [batch, heads, q_len, head_dim], the output [batch, q_len, heads, value_dim].

    Rows that are padding, or see no key, are zero.
    """
    _refuse_what_is_not_known(module, query, dropout, named)
    tokens = session_cache.claim(key, value)
    one_sequence = _takes_one_sequence(type(module).forward)
    if tokens is not None:
        rows = tokens.rows(query, attention_mask, is_self_attention=one_sequence)
    elif isinstance(attention_mask, MaskDescription):
        _check_lengths(attention_mask, query, key)
        rows = described_rows(attention_mask, is_self_attention=one_sequence, from_cache=False)
    else:
        rows = _rows_of_model(module, query, key, attention_mask, named)
    rows = _with_position_bias(rows, named.get("position_bias"))
    arguments = _options(query, scaling, rows.pattern, named)
    arguments |= {
        "layout": "packed",
        "query_lengths": rows.query_lengths(),
        "first_query_position": rows.first_query_position,
        "attention_mask": rows.mask(),
        "output_attentions": bool(named.get("output_attentions")),
    }
    queries = packed(query, rows.queries)
    if tokens is not None:
        result = tokens.attend(queries, rows, arguments)
    else:
        arguments["kv_lengths"] = rows.keys.sum(1).tolist()
        if model:
            arguments |= {"model": model, "layer": _layer_index(module)}
        keys, values = packed(key, rows.keys), packed(value, rows.keys)
        result = client.attend(queries, keys, values, **arguments)
    return padded(result.output, rows.queries), _weights(result, rows)


def _refuse_what_is_not_known(
    module: torch.nn.Module, query: torch.Tensor, dropout: float, named: Mapping[str, Any]
) -> None:
    known = _WITHOUT_EFFECT | {
        "is_causal",
        "output_attentions",
        "position_bias",
        "s_aux",
        "sliding_window",
        "softcap",
    }
    unknown = sorted(
        name for name, value in named.items() if name not in known and value is not None
    )
    if unknown:
        raise NotImplementedError(
            f"attention on attnd does not know {', '.join(unknown)}, which "
            f"{type(module).__name__} passes"
        )
    if dropout:
        raise NotImplementedError(f"attention on attnd has no dropout; it is {dropout}")
    if module.training and torch.is_grad_enabled() and query.requires_grad:
        raise NotImplementedError("attention on attnd has no gradients: model.eval()")


def _check_lengths(mask: MaskDescription, query: torch.Tensor, key: torch.Tensor) -> None:
    if (mask.q_length, mask.kv_length) != (query.shape[2], key.shape[2]):
        raise ValueError(
            f"the mask is of {mask.q_length} queries and {mask.kv_length} keys, the layer has "
            f"{query.shape[2]} and {key.shape[2]}: is part of the model's cache a SessionCache?"
        )


def _rows_of_model(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    named: Mapping[str, Any],
) -> Rows:
    """With a mask that the model made by itself, or with none."""
    q_len, kv_len = query.shape[2], key.shape[2]
    rows = all_rows(query.shape[0], q_len, kv_len)
    if mask is not None:
        return Rows(rows.queries, rows.keys, Pattern(), matrix=checked_matrix(mask, q_len, kv_len))
    # As sdpa takes no mask at all: query 0 stands at key 0, and one query alone sees everything.
    causal = named.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    causal = bool(causal) and q_len > 1
    window = named.get("sliding_window")
    reach = -1 if window is None else int(window) - 1
    pattern = Pattern(causal, reach, -1 if causal else reach)
    first = 0 if causal and kv_len != q_len else None
    positions = None if first is None else [first] * query.shape[0]
    return Rows(rows.queries, rows.keys, pattern, positions)


@functools.cache
def _takes_one_sequence(forward: Callable[..., Any]) -> bool:
    """Whether queries and keys can only be of the same tokens: nothing else is passed in."""
    parameters = inspect.signature(forward).parameters
    others = {"encoder_hidden_states", "key_value_states", "kv_states", "context", "key", "value"}
    return "hidden_states" in parameters and not any(
        name in others or (name.endswith("_states") and name != "hidden_states")
        for name in parameters
    )


def _with_position_bias(rows: Rows, bias: torch.Tensor | None) -> Rows:
    if bias is None:
        return rows
    matrix = bias
    if rows.matrix is not None and rows.matrix.dtype is torch.bool:
        matrix = torch.where(rows.matrix, bias, -torch.inf)
    elif rows.matrix is not None:
        matrix = bias + rows.matrix
    return Rows(rows.queries, rows.keys, rows.pattern, rows.first_query_position, matrix)


def _options(
    query: torch.Tensor, scaling: float | None, pattern: Pattern, named: Mapping[str, Any]
) -> AttendArguments:
    """All of them, so that those of a hosted model's layer are not used instead."""
    sinks = named.get("s_aux")
    return {
        "scale": query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        "is_causal": pattern.is_causal,
        "window_left": pattern.window_left,
        "window_right": pattern.window_right,
        "soft_cap": float(named.get("softcap") or 0.0),
        "alibi_slopes": [],
        "sink_logits": [] if sinks is None else sinks.detach().float().flatten().tolist(),
    }


def _layer_index(module: torch.nn.Module) -> int:
    index = getattr(module, "layer_idx", None)
    if index is None:
        raise NotImplementedError(
            f"{type(module).__name__} has no layer_idx: register it without a model"
        )
    return int(index)


def _weights(result: AttentionResult[torch.Tensor], rows: Rows) -> torch.Tensor | None:
    """[batch, heads, q_len, kv_len], zero in padding."""
    packed = result.attention_weights
    if packed is None or (bool(rows.queries.all()) and bool(rows.keys.all())):
        return packed
    batch, heads = packed.shape[:2]
    weights = packed.new_zeros(batch, heads, rows.queries.shape[1], rows.keys.shape[1])
    for row in range(batch):
        queries = rows.queries[row].nonzero()[:, 0].to(packed.device)
        keys = rows.keys[row].nonzero()[:, 0].to(packed.device)
        part = packed[row, :, : len(queries), : len(keys)]
        weights[row][:, queries[:, None], keys] = part
    return weights

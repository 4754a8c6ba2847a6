"""Which tokens of a padded batch are sent, and where the answer's rows belong.

Padding is neither sent nor cached: what remains of a row moves together. That changes no order, so
causality still holds by place; distances are kept where a row's tokens lie in one piece, which left
and right padding leave. Where a window would see other distances, the matrix travels too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnd.huggingface.masks import MaskDescription, Pattern


@dataclass(frozen=True)
class Rows:
    """Of padded tensors: what is sent, and how queries see keys among what is sent."""

    queries: torch.Tensor  # bool [batch, q_len], on the CPU: which queries are sent
    keys: torch.Tensor  # bool [batch, kv_len]: which keys are seen, those of a cache first
    pattern: Pattern
    first_query_position: list[int] | None = None
    matrix: torch.Tensor | None = None  # [batch or 1, heads or 1, q_len, kv_len], of all tokens

    def query_lengths(self) -> list[int]:
        lengths: list[int] = self.queries.sum(1).tolist()
        return lengths

    def mask(self) -> torch.Tensor | None:
        """The matrix without the padding's rows and columns, filled up to the longest row."""
        if self.matrix is None or (bool(self.queries.all()) and bool(self.keys.all())):
            return self.matrix
        batch, q_len, kv_len = *self.queries.shape, self.keys.shape[1]
        matrix = self.matrix.expand(batch, -1, q_len, kv_len)
        most_queries = int(self.queries.sum(1).max())
        most_keys = int(self.keys.sum(1).max())
        packed = matrix.new_zeros(batch, matrix.shape[1], most_queries, most_keys)
        for row in range(batch):
            queries = self.queries[row].nonzero()[:, 0].to(matrix.device)
            keys = self.keys[row].nonzero()[:, 0].to(matrix.device)
            kept = matrix[row].index_select(1, queries).index_select(2, keys)
            packed[row, :, : len(queries), : len(keys)] = kept
        return packed


def all_rows(batch: int, q_len: int, kv_len: int) -> Rows:
    return Rows(
        torch.ones(batch, q_len, dtype=torch.bool),
        torch.ones(batch, kv_len, dtype=torch.bool),
        Pattern(),
    )


def described_rows(mask: MaskDescription, *, is_self_attention: bool, from_cache: bool) -> Rows:
    """`is_self_attention`: queries of padding can be told, and are not sent.

    `from_cache`: the server appends to what it has, and so knows where the queries stand.
    """
    pattern = mask.pattern or Pattern()
    keys = torch.ones(mask.batch, mask.kv_length, dtype=torch.bool)
    if mask.padding is not None:
        keys = mask.padding.clone()
    first = mask.q_offset - mask.kv_offset  # the queries' first column
    if pattern.is_causal:
        keys[:, first + mask.q_length :] = False  # places of a static cache that are still empty
    queries = torch.ones(mask.batch, mask.q_length, dtype=torch.bool)
    if pattern.is_causal or (is_self_attention and first + mask.q_length == mask.kv_length):
        queries = keys[:, first : first + mask.q_length]
    needs_matrix = mask.pattern is None
    if pattern.has_window and not _in_one_piece(keys):
        needs_matrix = True
        if not pattern.is_causal:  # else the window among what is sent only sees more
            pattern = Pattern()
    positions = None
    if not from_cache and (pattern.is_causal or pattern.has_window):
        positions = _positions(queries, keys, first, pattern.is_causal)
    matrix = mask.matrix if needs_matrix else None
    return Rows(queries, keys, pattern, positions, matrix)


def _in_one_piece(keys: torch.Tensor) -> bool:
    starts = keys[:, 1:] & ~keys[:, :-1]
    return bool((starts.sum(1) + keys[:, 0] <= 1).all())


def _positions(
    queries: torch.Tensor, keys: torch.Tensor, first: int, is_causal: bool
) -> list[int] | None:
    """Of each row's first query among its keys; None where it is the API's default."""
    positions, defaults = [], []
    for row_queries, row_keys in zip(queries, keys, strict=True):
        default = int(row_keys.sum()) - int(row_queries.sum())
        defaults.append(default)
        if not row_queries.any() or not row_keys.any():
            positions.append(default)
            continue
        column = first + int(row_queries.int().argmax())
        if is_causal:
            positions.append(int(row_keys[:column].sum()))
        else:
            positions.append(column - int(row_keys.int().argmax()))
    return None if positions == defaults else positions


def checked_matrix(mask: torch.Tensor, q_len: int, kv_len: int) -> torch.Tensor:
    """A mask that a model made by itself; one for a longer cache is cut, as the models do."""
    if mask.ndim != 4 or mask.shape[2] not in (1, q_len) or mask.shape[3] < kv_len:
        raise ValueError(
            f"the mask is {list(mask.shape)}; it must be [batch, heads, {q_len}, {kv_len}]"
        )
    return mask[..., :kv_len]


def packed(tensor: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """[batch, heads, length, dim] to [tokens, heads, dim], without what is not kept."""
    tokens = tensor.detach().transpose(1, 2)
    if tokens.shape[0] != kept.shape[0]:
        tokens = tokens.expand(kept.shape[0], -1, -1, -1)
    if bool(kept.all()):
        return tokens.reshape(-1, *tokens.shape[2:])
    return tokens[kept.to(tensor.device)]


def padded(tokens: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """[tokens, heads, dim] to [batch, length, heads, dim], zero where nothing was kept."""
    if bool(kept.all()):
        return tokens.reshape(*kept.shape, *tokens.shape[1:])
    output = tokens.new_zeros(*kept.shape, *tokens.shape[1:])
    output[kept.to(tokens.device)] = tokens
    return output

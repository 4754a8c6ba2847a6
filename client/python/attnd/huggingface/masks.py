"""A mask of transformers as what it means: causality, a window, padding.

transformers asks a mask function for the mask of a forward pass and hands the answer to the
attention function of every layer. The one here answers with a description, from which the
attention function makes options and lengths. To code in between that takes it for a tensor, it is
one: it then becomes the matrix of booleans (True: attend) that `sdpa_mask` would have made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from transformers import masking_utils

# The functions that transformers' makers of masks return are told by their code, which is the same
# object in all of them; what they were made with is in their closures.
_AND = masking_utils.and_masks().__code__
_WINDOW = masking_utils.sliding_window_overlay(1).__code__
_WINDOW_BOTH_WAYS = masking_utils.sliding_window_bidirectional_overlay(1).__code__


@dataclass(frozen=True)
class Pattern:
    """Which keys a query sees by place; a window counts keys besides the query's own, -1: all."""

    is_causal: bool = False
    window_left: int = -1
    window_right: int = -1

    @property
    def has_window(self) -> bool:
        return self.window_left >= 0 or self.window_right >= 0

    def and_also(self, other: Pattern) -> Pattern:
        return Pattern(
            self.is_causal or other.is_causal,
            _narrower(self.window_left, other.window_left),
            _narrower(self.window_right, other.window_right),
        )


def _narrower(one: int, other: int) -> int:
    return max(one, other) if min(one, other) < 0 else min(one, other)


def recognise(mask_function: Callable[..., Any]) -> Pattern | None:
    """None: the function may be anything."""
    if mask_function is masking_utils.causal_mask_function:
        return Pattern(is_causal=True)
    if mask_function is masking_utils.bidirectional_mask_function:
        return Pattern()
    code = getattr(mask_function, "__code__", None)
    if code is _WINDOW:
        return Pattern(window_left=_closure(mask_function)["sliding_window"] - 1)
    if code is _WINDOW_BOTH_WAYS:
        reach = _closure(mask_function)["sliding_window"]
        return Pattern(window_left=reach, window_right=reach)
    if code is _AND:
        whole = Pattern()
        for part in _closure(mask_function)["mask_functions"]:
            pattern = recognise(part)
            if pattern is None:
                return None
            whole = whole.and_also(pattern)
        return whole
    return None


def _closure(function: Any) -> dict[str, Any]:
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    return dict(zip(function.__code__.co_freevars, cells, strict=True))


class MaskDescription:
    """Of [batch, 1, q_length, kv_length]; queries and keys begin at columns q_offset, kv_offset.

    `padding` is bool [batch, kv_length] on the CPU (True: a token), or None where all are tokens.
    `pattern` is None where only the matrix says what is seen.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._arguments = arguments  # sdpa_mask's
        self.batch = int(arguments["batch_size"])
        self.q_length = int(arguments["q_length"])
        self.kv_length = int(arguments["kv_length"])
        self.q_offset = int(arguments["q_offset"])
        self.kv_offset = int(arguments["kv_offset"])
        self.pattern = recognise(arguments["mask_function"])

    @cached_property
    def padding(self) -> torch.Tensor | None:
        padded: torch.Tensor | None = masking_utils.prepare_padding_mask(
            self._arguments["attention_mask"], self.kv_length, self.kv_offset
        )
        if padded is None:
            return None
        mask = padded[:, self.kv_offset : self.kv_offset + self.kv_length].bool().cpu()
        return None if bool(mask.all()) else mask

    @cached_property
    def matrix(self) -> torch.Tensor:
        """What sdpa_mask makes of it, bool [batch, 1, q_length, kv_length]."""
        made = masking_utils.sdpa_mask(
            **self._arguments, allow_is_causal_skip=False, allow_is_bidirectional_skip=False
        )
        return cast(torch.Tensor, made)

    # Like a tensor, without becoming one.

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.batch, 1, self.q_length, self.kv_length))

    @property
    def ndim(self) -> int:
        return 4

    @property
    def dtype(self) -> torch.dtype:
        return torch.bool

    @property
    def device(self) -> torch.device:
        return torch.device(self._arguments["device"])

    def dim(self) -> int:
        return 4

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def contiguous(self) -> MaskDescription:
        return self

    def clone(self) -> MaskDescription:
        return self

    def to(self, *arguments: Any, **named: Any) -> Any:
        """Itself on every device: what is in it goes to the server."""
        dtypes = [value for value in (*arguments, *named.values()) if _is_other_dtype(value)]
        return self.matrix.to(*arguments, **named) if dtypes else self

    def __getitem__(self, index: Any) -> Any:
        """Itself where nothing is cut off."""
        parts = index if isinstance(index, tuple) else (index,)
        if len(parts) <= 4 and all(
            isinstance(part, slice) and part.indices(size) == (0, size, 1)
            for part, size in zip(parts, self.shape, strict=False)
        ):
            return self
        return self.matrix[index]

    # As a tensor.

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: object,
        arguments: tuple[Any, ...] = (),
        named: dict[str, Any] | None = None,
    ) -> Any:
        named = {name: _as_tensor(value) for name, value in (named or {}).items()}
        return function(*(_as_tensor(value) for value in arguments), **named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.matrix, name)


def _is_other_dtype(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dtype is not torch.bool
    return isinstance(value, torch.dtype) and value is not torch.bool


def _as_tensor(value: Any) -> Any:
    if isinstance(value, MaskDescription):
        return value.matrix
    if isinstance(value, (list, tuple)):
        return type(value)(_as_tensor(element) for element in value)
    return value


def _operator(name: str) -> Callable[..., Any]:
    def apply(self: MaskDescription, *operands: Any) -> Any:
        return getattr(self.matrix, name)(*(_as_tensor(operand) for operand in operands))

    return apply


for _name in ("add", "sub", "mul", "and", "or", "xor"):  # Python looks operators up in the class
    for _prefix in ("", "r"):
        setattr(MaskDescription, f"__{_prefix}{_name}__", _operator(f"__{_prefix}{_name}__"))
for _name in ("invert", "eq", "ne"):
    setattr(MaskDescription, f"__{_name}__", _operator(f"__{_name}__"))


def describe(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | MaskDescription | None = None,
    *,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> MaskDescription:
    """The mask function: takes what sdpa_mask takes, what only concerns other ones included."""
    if isinstance(attention_mask, MaskDescription):
        return attention_mask  # a model in a model, which was given the outer one's mask
    return MaskDescription(
        {
            "batch_size": batch_size,
            "q_length": q_length,
            "kv_length": kv_length,
            "q_offset": q_offset,
            "kv_offset": kv_offset,
            "mask_function": mask_function,
            "attention_mask": attention_mask,
            "use_vmap": use_vmap,
            "device": device,
        }
    )

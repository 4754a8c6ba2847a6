"""NumPy arrays and PyTorch tensors, bfloat16 included, in and out of the API's Tensor message.

A contiguous array is not copied until the request's bytes are put together. What comes back is of
the kind that went in, writable, and owns its memory. PyTorch is only needed by who passes its
tensors; those are detached, and the ones on another device pass through the CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, TypeVar

import ml_dtypes
import numpy as np
import numpy.typing as npt

from attnd._proto.attention.v1 import types_pb2

if TYPE_CHECKING:
    import torch

AnyTensor: TypeAlias = "npt.NDArray[Any] | torch.Tensor"
TensorT = TypeVar("TensorT", bound="npt.NDArray[Any] | torch.Tensor")

_DTYPES: dict[str, types_pb2.DataType] = {
    "float32": types_pb2.DATA_TYPE_FLOAT32,
    "float16": types_pb2.DATA_TYPE_FLOAT16,
    "bfloat16": types_pb2.DATA_TYPE_BFLOAT16,
    "int32": types_pb2.DATA_TYPE_INT32,
    "int64": types_pb2.DATA_TYPE_INT64,
    "bool": types_pb2.DATA_TYPE_BOOL,
}
_NAMES = {number: name for name, number in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class EncodedTensor:
    """A Tensor message in two parts: everything but its `data`, and the bytes that are its data."""

    header: types_pb2.Tensor
    data: memoryview


def is_torch(value: object) -> TypeGuard[torch.Tensor]:
    """Whether this is a PyTorch tensor; does not import PyTorch."""
    module = sys.modules.get("torch")
    return module is not None and isinstance(value, module.Tensor)


def data_type(dtype: object) -> types_pb2.DataType:
    """The API's data type for a NumPy or PyTorch dtype, or its name. Others: TypeError."""
    if isinstance(dtype, str):
        name = dtype
    elif type(dtype).__module__.split(".")[0] == "torch":
        name = str(dtype).removeprefix("torch.")
    else:
        name = np.dtype(dtype).name  # type: ignore[call-overload]
    number = _DTYPES.get(name)
    if number is None:
        raise TypeError(f"dtype {name} can't be sent; there are {', '.join(_DTYPES)}")
    return number


def encode(name: str, value: object) -> EncodedTensor:
    """`name` is the argument's, for the message of a TypeError."""
    if is_torch(value):
        return EncodedTensor(_header(name, value.dtype, value.shape), _torch_bytes(value).data)
    if isinstance(value, np.ndarray):
        return EncodedTensor(_header(name, value.dtype, value.shape), _numpy_bytes(value).data)
    kind = type(value).__name__
    raise TypeError(f"{name} is a {kind}; it must be a NumPy array or a PyTorch tensor")


def _header(name: str, dtype: object, shape: Sequence[int]) -> types_pb2.Tensor:
    try:
        return types_pb2.Tensor(dtype=data_type(dtype), shape=shape)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from None


def _torch_bytes(value: torch.Tensor) -> npt.NDArray[np.uint8]:
    flat = value.detach().cpu().contiguous().reshape(-1)
    array: npt.NDArray[np.uint8] = flat.view(sys.modules["torch"].uint8).numpy()
    return array


def _numpy_bytes(value: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    if value.dtype.newbyteorder("<") != value.dtype:
        value = value.astype(value.dtype.newbyteorder("<"))
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8)


def decode(tensor: EncodedTensor, like: TensorT) -> TensorT:
    """The tensor in memory of its own, of `like`'s kind and on its device."""
    name = _NAMES.get(tensor.header.dtype)
    if name is None:
        raise TypeError(
            f"this client does not know data type {tensor.header.dtype}, which the server sent"
        )
    data = np.frombuffer(tensor.data, np.uint8)
    shape = tuple(tensor.header.shape)
    if is_torch(like):
        torch_module = sys.modules["torch"]
        result = torch_module.empty(shape, dtype=getattr(torch_module, name))
        _torch_bytes(result)[:] = data
        return result.to(like.device)  # type: ignore[no-any-return]
    return data.copy().view(numpy_dtype(name)).reshape(shape)  # type: ignore[return-value]


def numpy_dtype(name: str) -> np.dtype[Any]:
    """NumPy's dtype of this name; bfloat16 is that of ml_dtypes."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)

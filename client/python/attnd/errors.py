"""What a failed call raises: one class per gRPC code, all of them an AttndError.

The server's own account of an error (reason, details, retry delay) travels beside the status, as
the trailing metadata `attention-error-bin`. Errors that something else on the way made (no
connection, a deadline that passed in the client) have a code and a message alone.
"""

from __future__ import annotations

from typing import Any, ClassVar

import grpc
from google.protobuf.message import DecodeError

from attnd._proto.attention.v1 import attention_pb2

_METADATA_KEY = "attention-error-bin"


class AttndError(Exception):
    """A call that failed.

    `message` is for people. `reason` is for programs: UPPER_SNAKE_CASE, stable, listed in
    docs/errors.md; empty where the server did not send one. `details` holds values such as "field",
    "length" or "supporting". `retry_delay_seconds` is 0 where waiting will not help.
    """

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN

    def __init__(
        self,
        message: str,
        reason: str = "",
        details: dict[str, str] | None = None,
        retry_delay_seconds: float = 0.0,
    ) -> None:
        super().__init__(message, reason, details, retry_delay_seconds)
        self.message = message
        self.reason = reason
        self.details = dict(details or {})
        self.retry_delay_seconds = retry_delay_seconds

    def __str__(self) -> str:
        name = f"{self.code.name} ({self.reason})" if self.reason else self.code.name
        return f"{name}: {self.message}"


class Cancelled(AttndError):
    code = grpc.StatusCode.CANCELLED


class Unknown(AttndError):
    code = grpc.StatusCode.UNKNOWN


class InvalidArgument(AttndError):
    code = grpc.StatusCode.INVALID_ARGUMENT


class DeadlineExceeded(AttndError):
    code = grpc.StatusCode.DEADLINE_EXCEEDED


class NotFound(AttndError):
    code = grpc.StatusCode.NOT_FOUND


class AlreadyExists(AttndError):
    code = grpc.StatusCode.ALREADY_EXISTS


class PermissionDenied(AttndError):
    code = grpc.StatusCode.PERMISSION_DENIED


class ResourceExhausted(AttndError):
    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class FailedPrecondition(AttndError):
    code = grpc.StatusCode.FAILED_PRECONDITION


class Aborted(AttndError):
    code = grpc.StatusCode.ABORTED


class OutOfRange(AttndError):
    code = grpc.StatusCode.OUT_OF_RANGE


class Unimplemented(AttndError):
    code = grpc.StatusCode.UNIMPLEMENTED


class Internal(AttndError):
    code = grpc.StatusCode.INTERNAL


class Unavailable(AttndError):
    code = grpc.StatusCode.UNAVAILABLE


class DataLoss(AttndError):
    code = grpc.StatusCode.DATA_LOSS


class Unauthenticated(AttndError):
    code = grpc.StatusCode.UNAUTHENTICATED


_CLASSES: dict[grpc.StatusCode, type[AttndError]] = {
    error_class.code: error_class for error_class in AttndError.__subclasses__()
}


def from_proto(error: attention_pb2.Error) -> AttndError:
    """The typed exception for an error that a stream carried as an answer."""
    codes = {code.value[0]: code for code in grpc.StatusCode}
    error_class = _CLASSES.get(codes.get(error.code, grpc.StatusCode.UNKNOWN), Unknown)
    return error_class(error.message, error.reason, dict(error.details), error.retry_delay_seconds)


def from_rpc_error(error: Any) -> AttndError:
    """The typed exception for a grpc.RpcError that a call raised."""
    details = attention_pb2.Error()
    for key, value in error.trailing_metadata() or ():
        if key == _METADATA_KEY:
            try:
                details.ParseFromString(value)
            except DecodeError:
                details.Clear()
    error_class = _CLASSES.get(error.code(), Unknown)
    return error_class(
        error.details() or details.message,
        details.reason,
        dict(details.details),
        details.retry_delay_seconds,
    )

"""Errors of calls become typed exceptions, with what the server said of them."""

import pickle
import threading
from concurrent import futures

import grpc
import numpy as np
import pytest

import attnd
from attnd import errors
from attnd._proto.attention.v1 import attention_pb2

CODES = [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]


class _FailingService(grpc.GenericRpcHandler):
    """Answers every call with the status and trailing metadata that it was told to."""

    def __init__(self):
        self.code = grpc.StatusCode.UNKNOWN
        self.metadata = ()
        self.answers = threading.Event()
        self.answers.set()

    def service(self, handler_call_details):
        def fail(request, context):
            self.answers.wait()
            context.set_trailing_metadata(self.metadata)
            context.abort(self.code, "text for people")

        return grpc.unary_unary_rpc_method_handler(fail)


@pytest.fixture(scope="module")
def failing():
    service = _FailingService()
    server = grpc.server(futures.ThreadPoolExecutor(1), handlers=[service])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with attnd.Client(f"127.0.0.1:{port}", timeout=20.0) as client:
        yield service, client
    server.stop(None)


def serialized_error(**fields):
    return (("attention-error-bin", attention_pb2.Error(**fields).SerializeToString()),)


@pytest.mark.parametrize("code", CODES, ids=lambda code: code.name)
def test_every_code_has_a_class_of_its_name(failing, code):
    service, client = failing
    service.code, service.metadata = code, ()
    with pytest.raises(errors.AttndError) as raised:
        client.server_info()
    assert type(raised.value).__name__ == code.name.title().replace("_", "")
    assert raised.value.code is code
    assert raised.value.message == "text for people"
    assert raised.value.__cause__.code() is code


def test_reason_details_and_delay_are_decoded(failing):
    service, client = failing
    service.code = grpc.StatusCode.RESOURCE_EXHAUSTED
    service.metadata = serialized_error(
        code=service.code.value[0],
        message="text for people",
        reason="QUEUE_FULL",
        retry_delay_seconds=0.25,
        details={"length": "7"},
    )
    query = np.zeros((1, 1, 1, 1), np.float32)
    with pytest.raises(errors.ResourceExhausted) as raised:
        client.attend(query, query, query)
    assert raised.value.reason == "QUEUE_FULL"
    assert raised.value.retry_delay_seconds == 0.25
    assert raised.value.details == {"length": "7"}
    assert str(raised.value) == "RESOURCE_EXHAUSTED (QUEUE_FULL): text for people"


def test_broken_metadata_leaves_the_status(failing):
    service, client = failing
    service.code = grpc.StatusCode.NOT_FOUND
    service.metadata = (("attention-error-bin", b"\xff\xff\xff"),)
    with pytest.raises(errors.NotFound) as raised:
        client.list_models()
    assert raised.value.reason == ""
    assert raised.value.message == "text for people"


def test_a_deadline_of_the_call_goes_before_the_clients(failing):
    service, client = failing
    service.answers.clear()
    try:
        with pytest.raises(errors.DeadlineExceeded):
            client.server_info(timeout=0.1)
    finally:
        service.answers.set()


def test_no_server_is_unavailable(tmp_path):
    with (
        attnd.Client(f"unix:{tmp_path}/nothing.sock", timeout=20.0) as client,
        pytest.raises(errors.Unavailable),
    ):
        client.server_info()


def test_errors_survive_pickling():
    error = errors.OutOfRange("text", "POSITION_OUT_OF_RANGE", {"length": "7"}, 0.5)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is errors.OutOfRange
    assert vars(copy) == vars(error)

"""The official node tests of the ONNX operator Attention (opsets 23 to 25), over the wire."""

import warnings

import pytest
from onnx.backend.test.loader import load_model_tests
from onnx.backend.test.runner import Runner

from conformance.onnx_attention_backend import AttndBackend

EXPECTED_CASES = 93  # of onnx 1.23.2


def official_cases():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other operators' cases overflow on purpose
        cases = load_model_tests(kind="node")
    return [
        case
        for case in cases
        if case.name.startswith("test_attention") and "_expanded" not in case.name
    ]


CASES = official_cases()


@pytest.fixture(scope="module")
def backend(client):
    AttndBackend.client = client
    yield AttndBackend
    AttndBackend.client = None


def test_no_case_is_missing():
    assert len(CASES) == EXPECTED_CASES


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.removeprefix("test_"))
def test_case(backend, case):
    model = backend.prepare(case.model, "CPU")
    for inputs, expected in case.data_sets:
        # The comparison of ONNX' own runner, which widens the tolerance for bfloat16.
        Runner.assert_similar_outputs(expected, model.run(inputs), case.rtol, case.atol)

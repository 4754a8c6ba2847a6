"""The official node tests of the ONNX operator Attention (opsets 23 to 25), over the wire."""

import warnings

import numpy as np
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


# The expected float16 values come from float16 arithmetic, and are off by more than the official
# tolerance themselves. LibTorch's operator rounds elsewhere: two of float16's units in the last
# place, as the official runner allows bfloat16.
FLOAT16_TOLERANCE = 2**-9


@pytest.fixture
def backend(client):
    AttndBackend.client = client
    yield AttndBackend
    AttndBackend.client = None


def test_no_case_is_missing():
    assert len(CASES) == EXPECTED_CASES


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.removeprefix("test_"))
@pytest.mark.parametrize("implementation", ["standard", "auto"])
def test_case(backend, case, implementation):
    model = backend.prepare(case.model, "CPU", implementation=implementation)
    for inputs, expected in case.data_sets:
        rtol = case.rtol
        if implementation != "standard" and inputs[0].dtype == np.float16:
            rtol = FLOAT16_TOLERANCE
        # The comparison of ONNX' own runner, which widens the tolerance for bfloat16.
        Runner.assert_similar_outputs(expected, model.run(inputs), rtol, case.atol)

"""The implementation is switched while requests run: none fails, none is wrong."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import attnd
from attnd import api
from end_to_end import reference
from end_to_end.observe import Samples

IMPLEMENTATIONS = ("standard", "torch_sdpa")
REQUESTS = 2000
MODEL = "switched"
TOLERANCES = {"standard": 2e-5, "torch_sdpa": 2e-5}  # float32, absolute; outputs are below 4


@pytest.fixture
def model(client):
    layer = api.LayerSpec(repeat=2, num_heads=4, num_kv_heads=2, head_dim=16, value_dim=16)
    client.load_model(MODEL, spec=api.ModelSpec(stacks=[api.LayerStack(self_attention=[layer])]))
    yield MODEL
    client.unload_model(MODEL)


def make_problems():
    """Requests that both implementations can answer, with their answers."""
    problems = []
    shapes = ((5, 9), (1, 64), (33, 33), (16, 200))
    for seed, (q_len, kv_len) in enumerate(shapes):
        query, key, value = reference.random_problem(seed, q_len=q_len, kv_len=kv_len)
        mask = np.random.default_rng(seed).random((2, 1, q_len, kv_len)) < 0.8
        mask[..., 0] = True
        for options in ({}, {"is_causal": True}, {"attention_mask": mask}):
            expected = reference.attend(query, key, value, **options).output
            problems.append((query, key, value, options, expected))
    return problems


class Switcher(threading.Thread):
    """Switches to and fro until it is told to stop."""

    def __init__(self, address):
        super().__init__()
        self._address = address
        self._stopped = threading.Event()
        self.switches = 0
        self.failure = None

    def run(self):
        try:
            with attnd.Client(self._address, timeout=60.0) as client:
                for implementation in itertools.cycle(IMPLEMENTATIONS):
                    if self._stopped.is_set():
                        return
                    answer = client.switch_attention(MODEL, implementation)
                    assert answer.switched
                    self.switches += 1
        except BaseException as failure:
            self.failure = failure

    def stop(self):
        self._stopped.set()
        self.join()
        if self.failure is not None:
            raise self.failure


def send(address, problems, count):
    """The implementations that executed, one per request; a failed or wrong request raises."""
    executed = []
    with attnd.Client(address, timeout=60.0) as client:
        for query, key, value, options, expected in itertools.islice(
            itertools.cycle(problems), count
        ):
            result = client.attend(query, key, value, model=MODEL, layer=1, **options)
            implementation = result.execution.implementation
            error = np.abs(result.output - expected).max()
            assert error < TOLERANCES[implementation], implementation
            executed.append(implementation)
    return executed


@pytest.mark.timeout(600)
def test_requests_under_continuous_switching(server, model):
    before = Samples(server).total("attention_switches_total", model=MODEL)
    problems = make_problems()
    switcher = Switcher(server.address)
    with ThreadPoolExecutor(2) as callers:
        switcher.start()
        try:
            sent = [
                callers.submit(send, server.address, problems[offset:], REQUESTS // 2)
                for offset in (0, 5)
            ]
            executed = [implementation for each in sent for implementation in each.result()]
        finally:
            switcher.stop()
    assert len(executed) == REQUESTS
    assert set(executed) == set(IMPLEMENTATIONS)
    assert switcher.switches > 100
    # Switching to what is active already is no switch: the first one may have been that.
    counted = Samples(server).total("attention_switches_total", model=MODEL) - before
    assert counted in (switcher.switches, switcher.switches - 1)


def test_a_request_that_names_an_implementation_gets_it_whatever_is_active(server, client, model):
    query, key, value, options, expected = make_problems()[0]
    switcher = Switcher(server.address)
    switcher.start()
    try:
        for implementation in IMPLEMENTATIONS * 50:
            result = client.attend(
                query, key, value, model=MODEL, implementation=implementation, **options
            )
            assert result.execution.implementation == implementation
            assert np.abs(result.output - expected).max() < TOLERANCES[implementation]
    finally:
        switcher.stop()

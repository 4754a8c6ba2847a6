"""The control plane: models, implementations, hardware, and what it refuses."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import attnd
from attnd import api, errors
from end_to_end import reference

LAYER = api.LayerSpec(repeat=3, num_heads=4, num_kv_heads=2, head_dim=16, value_dim=16)
SPEC = api.ModelSpec(stacks=[api.LayerStack(self_attention=[LAYER])], dtype=api.DATA_TYPE_FLOAT32)


# Models.


def test_a_model_is_loaded_listed_used_and_unloaded(client, bert_directory, unload):
    unload.append("admin")
    loaded = client.load_model("admin", weights=bert_directory.name, implementation="standard")
    assert loaded.spec.name == "admin"
    assert loaded.active_implementation == "standard"
    assert loaded.reason
    assert [manager.device for manager in loaded.managers]
    listed = {model.spec.name: model for model in client.list_models()}
    assert listed["admin"].spec == loaded.spec
    before = listed["admin"].requests
    hidden_states = np.zeros((1, 3, 128), np.float32)
    output = client.forward(hidden_states, model="admin", layer=0).output
    assert output.shape == (1, 3, 128)
    listed = {model.spec.name: model for model in client.list_models()}
    assert listed["admin"].requests == before + 1
    client.unload_model("admin")
    assert "admin" not in {model.spec.name for model in client.list_models()}
    with pytest.raises(errors.NotFound):
        client.forward(hidden_states, model="admin", layer=0)


def test_a_name_in_use(client, bert_directory, unload):
    unload.append("twice")
    client.load_model("twice", spec=SPEC)
    for weights in ("", bert_directory.name):
        with pytest.raises(errors.AlreadyExists):
            client.load_model("twice", weights=weights, spec=None if weights else SPEC)
    client.unload_model("twice")
    client.load_model("twice", spec=SPEC)


def test_a_model_without_weights_serves_attend_and_no_forward(client, unload):
    unload.append("weightless")
    status = client.load_model("weightless", spec=SPEC)
    assert status.weight_bytes == 0
    query, key, value = reference.random_problem(1)
    result = client.attend(query, key, value, model="weightless", layer=2)
    np.testing.assert_allclose(result.output, reference.attend(query, key, value).output, atol=2e-5)
    with pytest.raises(errors.FailedPrecondition):
        client.forward(np.zeros((1, 2, 64), np.float32), model="weightless", layer=0)
    with pytest.raises(errors.NotFound):
        client.attend(query, key, value, model="weightless", layer=3)
    with pytest.raises(errors.InvalidArgument):
        client.attend(query[:, :2], key, value, model="weightless", layer=0)


def test_the_layers_options_hold_where_a_request_says_nothing(client, unload):
    unload.append("options")
    layer = api.LayerSpec(num_heads=4, num_kv_heads=2, head_dim=16, value_dim=16)
    layer.options.scale = 0.5
    layer.options.is_causal = True
    layer.options.window_left = 3
    layer.options.soft_cap = 2.0
    layer.options.sink_logits.values.extend([0.1, -0.5, 1.0, -2.0])
    spec = api.ModelSpec(stacks=[api.LayerStack(self_attention=[layer])])
    client.load_model("options", spec=spec)
    query, key, value = reference.random_problem(2)
    own = {"scale": 0.5, "is_causal": True, "window_left": 3, "soft_cap": 2.0}
    sinks = [0.1, -0.5, 1.0, -2.0]
    result = client.attend(query, key, value, model="options", output_lse=True)
    expected = reference.attend(query, key, value, sink_logits=sinks, **own)
    np.testing.assert_allclose(result.output, expected.output, atol=2e-5)
    np.testing.assert_allclose(result.lse, expected.lse, atol=2e-5)
    off = {"is_causal": False, "window_left": -1, "soft_cap": 0.0, "sink_logits": []}
    result = client.attend(query, key, value, model="options", **off)
    expected = reference.attend(query, key, value, scale=0.5)
    np.testing.assert_allclose(result.output, expected.output, atol=2e-5)


def test_a_model_of_several_stacks(client, unload):
    unload.append("stacks")
    small = api.LayerSpec(num_heads=2, num_kv_heads=2, head_dim=8, value_dim=8)
    spec = api.ModelSpec(
        stacks=[
            api.LayerStack(name="text", self_attention=[LAYER]),
            api.LayerStack(name="vision", self_attention=[small]),
        ]
    )
    client.load_model("stacks", spec=spec)
    array = np.ones((1, 2, 3, 8), np.float32)
    assert client.attend(array, array, array, model="stacks", stack="vision").output.shape
    for stack in ("", "audio"):
        with pytest.raises(errors.NotFound):
            client.attend(array, array, array, model="stacks", stack=stack)


def test_two_loads_of_one_name_at_once_make_one_model(server, client, bert_directory, unload):
    unload.append("race")

    def load(_):
        with attnd.Client(server.address, timeout=60.0) as own:
            try:
                own.load_model("race", weights=bert_directory.name)
                return "loaded"
            except errors.AlreadyExists:
                return "refused"

    with ThreadPoolExecutor(4) as callers:
        outcomes = list(callers.map(load, range(4)))
    assert sorted(outcomes) == ["loaded", "refused", "refused", "refused"]


@pytest.mark.parametrize("name", ["", "no/../way\n", "a b", "x" * 200])
def test_names_that_no_model_can_have(client, name):
    with pytest.raises(errors.InvalidArgument):
        client.load_model(name, spec=SPEC)


def spec_with(**fields):
    layer = api.LayerSpec()
    layer.CopyFrom(LAYER)
    for name, value in fields.items():
        setattr(layer, name, value)
    return api.ModelSpec(stacks=[api.LayerStack(self_attention=[layer])])


@pytest.mark.parametrize(
    "spec",
    [
        api.ModelSpec(),
        api.ModelSpec(stacks=[api.LayerStack()]),
        spec_with(num_heads=0),
        spec_with(num_heads=5),
        spec_with(head_dim=0),
        spec_with(head_dim=2**32 - 1),
        spec_with(repeat=2**32 - 1),
        api.ModelSpec(stacks=[SPEC.stacks[0], SPEC.stacks[0]]),
        api.ModelSpec(stacks=SPEC.stacks, dtype=99),
        api.ModelSpec(stacks=SPEC.stacks, instances=2**32 - 1),
    ],
    ids=[
        "empty",
        "no_layers",
        "no_heads",
        "heads_not_divided",
        "no_head_dim",
        "huge_head_dim",
        "huge_repeat",
        "two_stacks_of_one_name",
        "no_such_dtype",
        "more_instances_than_devices",
    ],
)
def test_specs_that_can_not_be(client, spec):
    with pytest.raises(errors.InvalidArgument):
        client.load_model("impossible", spec=spec)
    assert "impossible" not in {model.spec.name for model in client.list_models()}


def test_an_unknown_implementation_in_a_spec(client):
    with pytest.raises(errors.NotFound):
        client.load_model("impossible", spec=SPEC, implementation="no_such")


def test_what_is_not_there(client):
    with pytest.raises(errors.NotFound):
        client.unload_model("nothing")
    with pytest.raises(errors.NotFound):
        client.switch_attention("nothing", "standard")


# Implementations and the switch.


def test_implementations_are_listed_with_what_they_can_do(client):
    listed = {each.name: each for each in client.list_implementations()}
    assert set(listed) >= {"standard", "torch_sdpa"}
    for each in listed.values():
        assert each.backends
        assert api.DATA_TYPE_FLOAT32 in each.dtypes
        assert each.memory.startswith("O(")
        assert each.compute.startswith("O(")
        assert each.description
    assert listed["standard"].exact
    assert listed["standard"].outputs_attentions
    assert not listed["torch_sdpa"].outputs_attentions


def test_every_listed_implementation_can_be_switched_to(client, unload):
    unload.append("switched")
    client.load_model("switched", spec=SPEC)
    query, key, value = reference.random_problem(3)
    expected = reference.attend(query, key, value).output
    active = "auto"
    for implementation in [each.name for each in client.list_implementations()]:
        answer = client.switch_attention("switched", implementation)
        assert answer.switched
        assert (answer.previous, answer.active) == (active, implementation)
        result = client.attend(query, key, value, model="switched")
        assert result.execution.implementation == implementation
        np.testing.assert_allclose(result.output, expected, atol=2e-5)
        active = implementation
    again = client.switch_attention("switched", active)
    assert again.switched
    assert again.previous == again.active == active
    (status,) = (model for model in client.list_models() if model.spec.name == "switched")
    assert status.active_implementation == active
    assert status.switches == len(client.list_implementations())


def test_an_unknown_implementation_is_not_switched_to(client, unload):
    unload.append("switched")
    client.load_model("switched", spec=SPEC, implementation="standard")
    with pytest.raises(errors.NotFound):
        client.switch_attention("switched", "no_such")
    (status,) = (model for model in client.list_models() if model.spec.name == "switched")
    assert status.active_implementation == "standard"


def test_an_implementation_that_can_not_serve_the_model_is_not_switched_to(client, unload):
    """LibTorch's operator has no soft cap."""
    unload.append("capped")
    spec = spec_with()
    spec.stacks[0].self_attention[0].options.soft_cap = 30.0
    client.load_model("capped", spec=spec, implementation="standard")
    answer = client.switch_attention("capped", "torch_sdpa")
    assert not answer.switched
    assert answer.previous == answer.active == "standard"
    assert answer.reason
    with pytest.raises(errors.FailedPrecondition):
        client.load_model("impossible", spec=spec, implementation="torch_sdpa")


def test_what_a_named_implementation_can_not_do_is_refused_and_the_active_one_gives_way(client):
    query, key, value = reference.random_problem(4)
    wanted = {"output_attentions": True}
    with pytest.raises(errors.FailedPrecondition) as raised:
        client.attend(query, key, value, implementation="torch_sdpa", **wanted)
    assert "standard" in raised.value.message
    client.switch_attention("", "torch_sdpa")
    try:
        result = client.attend(query, key, value, **wanted)
    finally:
        client.switch_attention("", "auto")
    assert result.execution.implementation == "standard"
    assert "torch_sdpa" in result.execution.reason
    expected = reference.attend(query, key, value)
    np.testing.assert_allclose(
        result.attention_weights, expected.weights["probabilities"], atol=1e-5
    )


# The server itself.


def test_hardware(client):
    cpu = client.get_hardware().cpu
    assert cpu.model
    assert 1 <= cpu.cores <= os.cpu_count()
    assert 0 < cpu.available_bytes <= cpu.memory_bytes
    assert cpu.active in cpu.features


def test_server_info(client):
    info = client.server_info()
    assert info.version
    assert info.server_epoch
    assert not info.shared_memory
    assert info.max_request_bytes == info.max_response_bytes == 64 << 20
    assert info.max_tokens > 0


def test_every_start_is_an_epoch_of_its_own(client, start_server, connect):
    own = connect(start_server().address)
    assert own.server_info().server_epoch != client.server_info().server_epoch


def test_execution_facts(client):
    query, key, value = reference.random_problem(5, q_len=64, kv_len=64)
    execution = client.attend(query, key, value, implementation="standard").execution
    assert execution.backend.startswith("cpu/")
    assert execution.reason
    assert execution.queue_seconds >= 0.0
    assert execution.compute_seconds > 0.0
    assert execution.peak_workspace_bytes > 0
    # Two products of 64 x 64 x 16 multiply-adds for each of 2 x 4 heads.
    assert execution.flops == 2 * 2 * 64 * 64 * 16 * 8
    assert execution.sparsity is None
    assert execution.batched_requests == 1

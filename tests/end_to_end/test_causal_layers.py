"""Layers of causal language models, served, against the library's eager attention."""

from contextlib import ExitStack, contextmanager

import pytest
import torch

from attnd import api
from end_to_end import causal_models

# LibTorch's operator has no soft cap and no sinks.
IMPLEMENTATIONS = [
    (name, implementation)
    for name in causal_models.FAMILIES
    for implementation in ("standard", "torch_sdpa")
    if implementation == "standard" or name not in ("gemma2", "gpt_oss")
]
TOLERANCE = 1e-4  # float32, absolute; outputs are of the order of 1
# Beyond the window of 16, and beyond the 32 positions that phi3's short factors are for: the
# library takes one set of factors for a whole batch.
LENGTHS = [45, 33, 40, 37]
# Padding before and behind each row.
PADDING = [(0, 0), (12, 0), (0, 5), (3, 5)]
BEYOND_ORIGINAL_POSITIONS = 150


@contextmanager
def served(client, model_root, model, name):
    model.save_pretrained(model_root / name)
    client.load_model(name, weights=name)
    try:
        yield name
    finally:
        client.unload_model(name, close_sessions=True)


@pytest.fixture(scope="module")
def families(client, model_root):
    with ExitStack() as stack:
        models = {}
        for name in causal_models.FAMILIES:
            model = causal_models.make_causal(name, seed=21)
            stack.enter_context(served(client, model_root, model, f"layers-{name}"))
            models[name] = model
        yield models


def variant_name(variant):
    family, settings = variant
    return f"{family}-{'-'.join(settings)}"


@pytest.fixture(scope="module", params=causal_models.VARIANTS, ids=variant_name)
def variant(client, model_root, request):
    family, settings = request.param
    model = causal_models.make_causal(family, seed=22, **settings)
    with served(client, model_root, model, "layers-variant") as name:
        yield model, name


def tokens(length, rows=1, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, causal_models.VOCABULARY, (rows, length), generator=generator)


def padded(padding):
    """(input_ids, attention_mask, position_ids), as transformers makes them of padded prompts."""
    ids = tokens(max(LENGTHS), len(LENGTHS))
    mask = torch.zeros_like(ids)
    for row, (before, behind) in enumerate(padding):
        mask[row, before : ids.shape[1] - behind] = 1
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    return ids * mask, mask, positions


def assert_close(result, expected, mask=None, tolerance=TOLERANCE):
    """At the tokens that are none of the padding."""
    if mask is not None:
        result, expected = result[mask.bool()], expected[mask.bool()]
    assert result.shape == expected.shape
    assert expected.abs().mean() > 0.1  # otherwise the tolerance says nothing
    assert (result - expected).abs().max().item() < tolerance


@pytest.mark.parametrize(("name", "implementation"), IMPLEMENTATIONS)
def test_padding_masks(client, families, name, implementation):
    model = families[name]
    ids, mask, positions = padded(PADDING)
    calls = causal_models.attention_calls(
        model, input_ids=ids, attention_mask=mask, position_ids=positions
    )
    assert len(calls) == causal_models.LAYERS
    for index, call in enumerate(calls):
        result = client.forward(
            call.hidden_states,
            model=f"layers-{name}",
            layer=index,
            attention_mask=mask,
            position_ids=positions,
            implementation=implementation,
        )
        assert result.execution.implementation == implementation
        assert_close(result.output, call.output, mask)


@pytest.mark.parametrize(("name", "implementation"), IMPLEMENTATIONS)
def test_lengths_stand_for_right_padding(client, families, name, implementation):
    model = families[name]
    ids, mask, positions = padded([(0, LENGTHS[0] - length) for length in LENGTHS])
    calls = causal_models.attention_calls(
        model, input_ids=ids, attention_mask=mask, position_ids=positions
    )
    for index, call in enumerate(calls):
        common = {"model": f"layers-{name}", "layer": index, "implementation": implementation}
        padded_rows = client.forward(call.hidden_states, query_lengths=LENGTHS, **common).output
        assert_close(padded_rows, call.output, mask)
        assert (padded_rows[mask == 0] == 0).all()
        end_to_end = client.forward(
            call.hidden_states[mask.bool()], query_lengths=LENGTHS, **common
        ).output
        assert_close(end_to_end, call.output[mask.bool()])


@pytest.mark.parametrize(("name", "implementation"), IMPLEMENTATIONS)
def test_contexts_beyond_the_original_positions(client, families, name, implementation):
    model = families[name]
    ids = tokens(BEYOND_ORIGINAL_POSITIONS)
    for index, call in enumerate(causal_models.attention_calls(model, input_ids=ids)):
        result = client.forward(
            call.hidden_states, model=f"layers-{name}", layer=index, implementation=implementation
        )
        assert_close(result.output, call.output)


@pytest.mark.parametrize("length", [20, 70])
def test_other_settings_of_a_family(client, variant, length):
    model, name = variant
    ids = tokens(length, rows=2)
    for index, call in enumerate(causal_models.attention_calls(model, input_ids=ids)):
        result = client.forward(call.hidden_states, model=name, layer=index)
        assert_close(result.output, call.output)


@pytest.mark.parametrize("name", causal_models.FAMILIES)
def test_weights_are_those_of_eager_attention(client, families, name):
    model = families[name]
    ids, mask, positions = padded(PADDING)
    calls = causal_models.attention_calls(
        model, input_ids=ids, attention_mask=mask, position_ids=positions
    )
    for index, call in enumerate(calls):
        weights = client.forward(
            call.hidden_states,
            model=f"layers-{name}",
            layer=index,
            attention_mask=mask,
            position_ids=positions,
            output_attentions=True,
        ).attention_weights
        rows = mask.bool()[:, None, :].expand(weights.shape[:3])
        assert (weights[rows] - call.weights[rows]).abs().max().item() < TOLERANCE


def relative_error(result, exact):
    return ((result.float() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("name", causal_models.FAMILIES)
def test_bfloat16_weights(client, model_root, name):
    """As near to float32 with the same weights and inputs as the library's bfloat16 is."""
    model = causal_models.make_causal(name, seed=23).to(torch.bfloat16)
    ids = tokens(60)
    rounded = causal_models.attention_calls(model, input_ids=ids)
    with served(client, model_root, model, f"bfloat16-{name}") as served_name:
        (status,) = (each for each in client.list_models() if each.spec.name == served_name)
        assert status.spec.dtype == api.DATA_TYPE_BFLOAT16
        exact_model = model.to(torch.float32)
        for index, call in enumerate(rounded):
            exact = layer_output(exact_model, index, call.hidden_states.float())
            library_error = relative_error(call.output, exact)
            assert 2**-9 < library_error < 2**-5  # of a unit roundoff of 2^-9
            result = client.forward(call.hidden_states, model=served_name, layer=index)
            assert result.output.dtype == torch.bfloat16
            assert relative_error(result.output, exact) < 1.5 * library_error


@torch.no_grad()
def layer_output(model, index, hidden_states):
    """Of one layer's attention, given these hidden states in the place of its own."""
    attention = model.model.layers[index].self_attn
    outputs = []
    handles = [
        attention.register_forward_pre_hook(
            lambda module, args, kwargs: (
                args[1:],
                {**kwargs, "hidden_states": hidden_states},
            ),
            with_kwargs=True,
        ),
        attention.register_forward_hook(lambda module, inputs, output: outputs.append(output[0])),
    ]
    model(input_ids=torch.zeros(hidden_states.shape[:2], dtype=torch.int64))
    for handle in handles:
        handle.remove()
    return outputs[0]


@pytest.mark.parametrize("name", causal_models.FAMILIES)
def test_list_models_shows_every_layer(client, families, name):
    model = families[name]
    config = model.config
    (status,) = (each for each in client.list_models() if each.spec.name == f"layers-{name}")
    assert status.spec.modality == api.MODALITY_LANGUAGE
    assert status.spec.dtype == api.DATA_TYPE_FLOAT32
    (stack,) = status.spec.stacks
    assert stack.hidden_size == config.hidden_size
    assert stack.max_positions == 0  # rotary: no limit
    layers = [run for run in stack.self_attention for _ in range(max(run.repeat, 1))]
    assert len(layers) == config.num_hidden_layers
    types = getattr(config, "layer_types", None)
    for index, layer in enumerate(layers):
        attention = model.model.layers[index].self_attn
        assert layer.num_heads == config.num_attention_heads
        assert layer.num_kv_heads == config.num_key_value_heads
        assert layer.head_dim == layer.value_dim == attention.head_dim
        assert layer.options.is_causal
        scale = layer.options.scale or layer.head_dim**-0.5
        assert scale == pytest.approx(attention.scaling)
        window = getattr(config, "sliding_window", None)
        if types is not None and types[index] == "full_attention":
            window = None
        assert (layer.options.window_left if layer.options.HasField("window_left") else -1) == (
            -1 if window is None else window - 1
        )
        assert layer.options.soft_cap == (getattr(config, "attn_logit_softcapping", None) or 0)
        sinks = getattr(attention, "sinks", torch.zeros(0))
        assert list(layer.options.sink_logits.values) == pytest.approx(sinks.tolist())
        rope = config.rope_parameters
        rope = rope[types[index]] if "full_attention" in rope else rope
        assert layer.rotary.theta == rope["rope_theta"]
        scaling = rope["rope_type"]
        assert layer.rotary.scaling == ("" if scaling == "default" else scaling)

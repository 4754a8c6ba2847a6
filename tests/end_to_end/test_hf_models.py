"""Layers of transformers' models, served, against the library's eager attention."""

from contextlib import contextmanager

import pytest
import torch

from attnd import api, errors
from end_to_end import hf_models

IMPLEMENTATIONS = ("standard", "torch_sdpa")
TOLERANCE = 1e-4  # float32, absolute; outputs are of the order of 1


@contextmanager
def served(client, model_root, model, name):
    model.save_pretrained(model_root / name)
    client.load_model(name, weights=name)
    try:
        yield name
    finally:
        client.unload_model(name)


@pytest.fixture(scope="module")
def bert(client, model_root):
    model = hf_models.make_bert(seed=1)
    with served(client, model_root, model, "bert") as name:
        yield model, name


@pytest.fixture(scope="module", params=[True, False], ids=["qkv_bias", "no_qkv_bias"])
def vit(client, model_root, request):
    model = hf_models.make_vit(seed=2, qkv_bias=request.param)
    with served(client, model_root, model, f"vit-{request.param}") as name:
        yield model, name


def sentences(lengths, side="right", vocabulary=500):
    """(input_ids, attention_mask) of random tokens, padded as a tokenizer pads them."""
    generator = torch.Generator().manual_seed(3)
    longest = max(lengths)
    place = torch.arange(longest).expand(len(lengths), longest)
    length = torch.tensor(lengths)[:, None]
    mask = (place < length if side == "right" else place >= longest - length).long()
    ids = torch.randint(1, vocabulary, mask.shape, generator=generator)
    return ids * mask, mask


def largest_difference(result, expected, mask=None):
    difference = (result - expected).abs().amax(-1)
    return (difference if mask is None else difference[mask.bool()]).max().item()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_bert_layers_with_padding_masks(client, bert, implementation, side):
    model, name = bert
    ids, mask = sentences([31, 7, 1, 24], side)
    for index, call in enumerate(hf_models.bert_calls(model, ids, mask)):
        assert call.output[mask.bool()].abs().mean() > 0.1  # otherwise the tolerance says nothing
        result = client.forward(
            call.hidden_states,
            model=name,
            layer=index,
            attention_mask=mask,
            implementation=implementation,
        )
        assert result.execution.implementation == implementation
        assert largest_difference(result.output, call.output, mask) < TOLERANCE


def test_bert_without_a_mask(client, bert):
    model, name = bert
    ids, _ = sentences([128])  # all positions that it has
    for index, call in enumerate(hf_models.bert_calls(model, ids)):
        result = client.forward(call.hidden_states, model=name, layer=index)
        assert largest_difference(result.output, call.output) < TOLERANCE


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_lengths_say_what_a_padding_mask_does_and_zero_the_padding(client, bert, implementation):
    model, name = bert
    lengths = [31, 7, 1, 24]
    ids, mask = sentences(lengths)
    call = hf_models.bert_calls(model, ids, mask)[1]
    result = client.forward(
        call.hidden_states,
        model=name,
        layer=1,
        query_lengths=lengths,
        implementation=implementation,
    )
    assert largest_difference(result.output, call.output, mask) < TOLERANCE
    assert (result.output[~mask.bool()] == 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_end_to_end_need_no_padding(client, bert, implementation):
    model, name = bert
    lengths = [31, 7, 1, 24]
    ids, mask = sentences(lengths)
    call = hf_models.bert_calls(model, ids, mask)[2]
    result = client.forward(
        call.hidden_states[mask.bool()],
        model=name,
        layer=2,
        query_lengths=lengths,
        implementation=implementation,
    )
    assert largest_difference(result.output, call.output[mask.bool()]) < TOLERANCE


def test_weights_are_those_of_eager_attention(client, bert):
    model, name = bert
    ids, mask = sentences([9, 5])
    for index, call in enumerate(hf_models.bert_calls(model, ids, mask)):
        result = client.forward(
            call.hidden_states,
            model=name,
            layer=index,
            attention_mask=mask,
            output_attentions=True,
        )
        weights = result.attention_weights
        assert weights.shape == call.weights.shape
        rows = mask.bool()[:, None, :].expand(weights.shape[:3])
        assert largest_difference(weights, call.weights, rows) < TOLERANCE


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_inline_past_continues_where_present_ended(client, bert, implementation):
    model, name = bert
    ids, _ = sentences([24, 24])
    call = hf_models.bert_calls(model, ids)[0]
    common = {"model": name, "layer": 0, "implementation": implementation}
    first = client.forward(call.hidden_states[:, :10], use_cache=True, **common)
    assert first.present_key.shape == (2, 4, 10, 32)
    second = client.forward(
        call.hidden_states[:, 10:],
        past_key=first.present_key,
        past_value=first.present_value,
        use_cache=True,
        **common,
    )
    # A bidirectional layer's later tokens see all the earlier ones.
    assert largest_difference(second.output, call.output[:, 10:]) < TOLERANCE
    whole = client.forward(call.hidden_states, use_cache=True, **common)
    assert largest_difference(second.present_key, whole.present_key) < TOLERANCE
    assert largest_difference(second.present_value, whole.present_value) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_hidden_states_of_another_dtype_than_the_models(client, bert, dtype):
    model, name = bert
    ids, mask = sentences([12, 5])
    call = hf_models.bert_calls(model, ids, mask)[0]
    rounded = call.hidden_states.to(dtype)
    exact = client.forward(rounded.float(), model=name, layer=0, attention_mask=mask).output
    result = client.forward(rounded, model=name, layer=0, attention_mask=mask).output
    assert result.dtype == dtype
    # Computed in the model's float32, and rounded once at the end.
    assert torch.allclose(result.float(), exact.to(dtype).float(), rtol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vit_layers_on_patches(client, vit, implementation):
    model, name = vit
    generator = torch.Generator().manual_seed(4)
    pixels = torch.randn(2, 3, 224, 224, generator=generator)
    for index, call in enumerate(hf_models.vit_calls(model, pixels)):
        assert call.hidden_states.shape == (2, 197, 192)
        assert call.output.abs().mean() > 0.1
        result = client.forward(
            call.hidden_states, model=name, layer=index, implementation=implementation
        )
        assert largest_difference(result.output, call.output) < TOLERANCE


def test_the_spec_of_a_served_directory_is_read_from_it(client, bert):
    _, name = bert
    (status,) = (status for status in client.list_models() if status.spec.name == name)
    (stack,) = status.spec.stacks
    assert stack.hidden_size == 128
    assert stack.max_positions == 128
    layers = [layer for layer in stack.self_attention for _ in range(max(layer.repeat, 1))]
    assert len(layers) == 3
    assert {(layer.num_heads, layer.head_dim) for layer in layers} == {(4, 32)}
    assert status.weight_bytes >= 3 * 4 * (128 * 128 + 128) * 4


def test_positions_beyond_the_learned_table(client, bert):
    _, name = bert
    hidden_states = torch.zeros(1, 129, 128)
    with pytest.raises(errors.OutOfRange):
        client.forward(hidden_states, model=name, layer=0)
    with pytest.raises(errors.OutOfRange):
        client.forward(
            hidden_states[:, :1], model=name, layer=0, position_ids=torch.tensor([[128]])
        )


def test_options_of_a_request_override_the_layers(client, bert):
    model, name = bert
    ids, _ = sentences([16])
    hidden_states = hf_models.bert_calls(model, ids)[0].hidden_states
    causal = api.AttentionOptions(is_causal=True)
    result = client.forward(hidden_states, model=name, layer=0, options=causal).output
    for length in (1, 7):  # what comes later is not seen
        part = client.forward(hidden_states[:, :length], model=name, layer=0, options=causal).output
        assert largest_difference(result[:, :length], part) < TOLERANCE
    full = client.forward(hidden_states, model=name, layer=0).output
    assert largest_difference(result[:, -1], full[:, -1]) < TOLERANCE
    assert largest_difference(result[:, 0], full[:, 0]) > 0.1

"""Whisper's layers, served, against the library's eager attention: the encoder's, the decoder's own
and those that see the encoder; its keys kept in sessions; and what is wrong with a request."""

import grpc
import numpy as np
import pytest
import torch

from attnd import api, errors
from attnd._proto.attention.v1 import types_pb2
from end_to_end import messages, speech_models
from end_to_end.messages import ATTENTION, BOOL, INT64, tensor

IMPLEMENTATIONS = ("standard", "flash", "torch_sdpa")
TOLERANCE = 1e-4  # float32, absolute; outputs are of the order of 1
NAME = "whisper"
KV_LENGTHS = [63, speech_models.FRAMES]


@pytest.fixture(scope="module")
def whisper(client, model_root):
    model = speech_models.make_whisper(seed=31)
    model.save_pretrained(model_root / NAME)
    client.load_model(NAME, weights=NAME)
    yield model
    client.unload_model(NAME, close_sessions=True)


@pytest.fixture(scope="module")
def calls(whisper):
    return speech_models.speech_calls(whisper)


@pytest.fixture
def cross(client, whisper):
    """Forward of a layer that sees the encoder."""

    def forward(hidden_states, encoder_hidden_states=None, **arguments):
        place = {"model": NAME, "stack": "decoder", "kind": "cross"}
        return client.forward(
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            **{**place, **arguments},
        )

    return forward


def assert_close(result, expected):
    assert result.shape == expected.shape
    assert expected.abs().mean() > 0.1  # otherwise the tolerance says nothing
    assert (result - expected).abs().max().item() < TOLERANCE


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_encoder_layers(client, calls, implementation):
    assert len(calls.encoder) == 2
    for index, call in enumerate(calls.encoder):
        assert call.hidden_states.shape[1] == speech_models.FRAMES
        result = client.forward(
            call.hidden_states,
            model=NAME,
            stack="encoder",
            layer=index,
            implementation=implementation,
        )
        assert_close(result.output, call.output)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_decoder_layers_of_its_own_tokens(client, calls, implementation):
    assert len(calls.decoder) == 3
    tokens = calls.padding.bool()
    for index, call in enumerate(calls.decoder):
        result = client.forward(
            call.hidden_states,
            model=NAME,
            stack="decoder",
            layer=index,
            attention_mask=calls.padding,
            implementation=implementation,
        )
        assert_close(result.output[tokens], call.output[tokens])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_decoder_layers_that_see_the_encoder(calls, cross, implementation):
    assert len(calls.cross) == 3
    for index, call in enumerate(calls.cross):
        result = cross(
            call.hidden_states,
            calls.encoder_hidden_states,
            layer=index,
            implementation=implementation,
        )
        assert result.execution.implementation == implementation
        assert_close(result.output, call.output)


def test_weights_are_those_of_eager_attention(calls, cross):
    for index, call in enumerate(calls.cross):
        result = cross(
            call.hidden_states, calls.encoder_hidden_states, layer=index, output_attentions=True
        )
        assert result.attention_weights.shape == call.weights.shape
        assert call.weights.max() > 0.1  # far from uniform over 100 keys
        assert (result.attention_weights - call.weights).abs().max().item() < TOLERANCE


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_encoders_of_differing_lengths(whisper, calls, cross, implementation):
    """Padded and end to end, on either side; what lies in padding does not matter."""
    query_lengths = calls.padding.sum(1).tolist()
    tokens = calls.padding.bool()
    frames = torch.arange(speech_models.FRAMES) < torch.tensor(KV_LENGTHS)[:, None]
    encoder = calls.encoder_hidden_states.masked_fill(~frames[..., None], torch.nan)
    lengths = {"query_lengths": query_lengths, "kv_lengths": KV_LENGTHS}
    for index, call in enumerate(calls.cross):
        expected, _ = speech_models.masked_cross_attention(
            whisper, index, call.hidden_states, calls.encoder_hidden_states, KV_LENGTHS
        )
        assert (expected - call.output)[0].abs().max() > 0.01  # the lengths matter
        common = {"layer": index, "implementation": implementation, **lengths}
        for keys in (encoder, encoder[frames]):
            padded = cross(call.hidden_states, keys, **common).output
            assert_close(padded[tokens], expected[tokens])
            assert (padded[~tokens] == 0).all()
            packed = cross(call.hidden_states[tokens], keys, **common).output
            assert_close(packed, expected[tokens])


def test_a_mask_of_the_encoders_keys(whisper, calls, cross):
    mask = (torch.arange(speech_models.FRAMES) < torch.tensor(KV_LENGTHS)[:, None]).long()
    for index, call in enumerate(calls.cross):
        expected, weights = speech_models.masked_cross_attention(
            whisper, index, call.hidden_states, calls.encoder_hidden_states, KV_LENGTHS
        )
        result = cross(
            call.hidden_states,
            calls.encoder_hidden_states,
            layer=index,
            attention_mask=mask,
            output_attentions=True,
        )
        assert_close(result.output, expected)
        assert (result.attention_weights - weights).abs().max().item() < TOLERANCE


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_encoders_keys_are_kept_in_sessions(client, whisper, calls, cross, implementation):
    """Sent once, with no question; then one token after the other asks for them."""
    encoder = calls.encoder_hidden_states
    sessions = [client.open_session(NAME) for _ in range(2)]
    common = {"sessions": sessions, "implementation": implementation}
    for index, call in enumerate(calls.cross):
        kept = cross(
            call.hidden_states[:, :0],
            encoder,
            layer=index,
            kv_lengths=KV_LENGTHS,
            **common,
        )
        assert list(kept.cache_length) == KV_LENGTHS
        expected, _ = speech_models.masked_cross_attention(
            whisper, index, call.hidden_states, encoder, KV_LENGTHS
        )
        outputs = []
        for token in call.hidden_states.split(1, dim=1):
            result = cross(token, layer=index, cache_mode="read_only", **common)
            assert list(result.cache_length) == KV_LENGTHS
            outputs.append(result.output)
        assert_close(torch.cat(outputs, dim=1), expected)
        # Beside the decoder's own cache, which nothing has been added to.
        (cache,) = [
            each for each in sessions[0].get().layers if (each.layer, each.length) == (index, 63)
        ]
        assert (cache.stack, cache.kind) == ("decoder", types_pb2.ATTENTION_KIND_CROSS)
    (fork,) = sessions[0].fork(length=1)
    assert fork.length(0, stack="decoder", kind="cross") == 63  # shared whole
    for session in (*sessions, fork):
        session.close()


def test_the_encoder_with_a_first_question_and_a_call_again(client, whisper, calls, cross):
    """Appended by the call that asks; a retry appends it once."""
    call = calls.cross[1]
    expected, _ = speech_models.masked_cross_attention(
        whisper, 1, call.hidden_states[:1], calls.encoder_hidden_states[:1], [100]
    )
    with client.open_session(NAME) as session:
        for _ in range(2):
            result = cross(
                call.hidden_states[:1],
                calls.encoder_hidden_states[:1],
                layer=1,
                sessions=[session],
                step=7,
            )
            assert list(result.cache_length) == [100]
            assert_close(result.output, expected)


def test_keys_that_the_caller_carries(calls, cross):
    call = calls.cross[0]
    encoder = calls.encoder_hidden_states
    first = cross(call.hidden_states, encoder, layer=0, use_cache=True)
    assert first.present_key.shape == (2, 6, speech_models.FRAMES, 16)
    again = cross(
        call.hidden_states,
        encoder[:, :0],
        layer=0,
        past_key=first.present_key,
        past_value=first.present_value,
    )
    assert_close(again.output, call.output)


def test_bfloat16_hidden_states_of_one_side(calls, cross):
    call = calls.cross[0]
    rounded = calls.encoder_hidden_states.to(torch.bfloat16)
    expected = cross(call.hidden_states, rounded.float(), layer=0).output
    result = cross(call.hidden_states, rounded, layer=0).output
    assert result.dtype == torch.float32
    assert (result - expected).abs().max().item() < 1e-5


def test_list_models_shows_both_stacks(client, whisper):
    (status,) = (each for each in client.list_models() if each.spec.name == NAME)
    encoder, decoder = status.spec.stacks
    assert (encoder.name, decoder.name) == ("encoder", "decoder")
    assert status.spec.modality == api.MODALITY_MULTIMODAL
    assert decoder.modality == api.MODALITY_LANGUAGE
    assert (encoder.max_positions, decoder.max_positions) == (speech_models.FRAMES, 64)
    assert not encoder.cross_attention
    assert [run.repeat for run in decoder.cross_attention] == [3]
    (layers,) = decoder.cross_attention
    assert (layers.num_heads, layers.head_dim, layers.encoder_hidden_size) == (6, 16, 96)
    assert not layers.options.is_causal
    assert decoder.self_attention[0].options.is_causal
    assert not encoder.self_attention[0].options.is_causal


# What is wrong, by the field that the answer names.

HIDDEN = 96


def request(kind=types_pb2.ATTENTION_KIND_CROSS, stack="decoder", **fields):
    """A good one, but for what is given."""
    good = {
        "layer": messages.layer(model=NAME, stack=stack, kind=kind),
        "hidden_states": tensor(2, 3, HIDDEN),
        "encoder_hidden_states": tensor(2, 5, HIDDEN),
    }
    return messages.forward(**{**good, **fields})


PACKED = tensor(9, HIDDEN)
SELF = types_pb2.ATTENTION_KIND_SELF
WRONG = {
    "no_encoder": ("encoder_hidden_states", {"encoder_hidden_states": None}),
    "encoder_of_integers": (
        "encoder_hidden_states",
        {"encoder_hidden_states": tensor(2, 5, HIDDEN, dtype=INT64)},
    ),
    "encoder_of_booleans": (
        "encoder_hidden_states",
        {"encoder_hidden_states": tensor(2, 5, HIDDEN, dtype=BOOL)},
    ),
    "another_width": ("encoder_hidden_states", {"encoder_hidden_states": tensor(2, 5, HIDDEN + 1)}),
    "another_batch": ("encoder_hidden_states", {"encoder_hidden_states": tensor(3, 5, HIDDEN)}),
    "batch_of_one": ("encoder_hidden_states", {"encoder_hidden_states": tensor(1, 5, HIDDEN)}),
    "encoder_of_rank_4": (
        "encoder_hidden_states",
        {"encoder_hidden_states": tensor(2, 1, 5, HIDDEN)},
    ),
    "encoder_with_surplus_bytes": (
        "encoder_hidden_states",
        {"encoder_hidden_states": tensor(2, 5, HIDDEN, data=bytes(2 * 5 * HIDDEN * 4 + 1))},
    ),
    "too_few_lengths": ("kv_lengths", {"kv_lengths": [5]}),
    "a_length_beyond_the_tensor": ("kv_lengths", {"kv_lengths": [5, 6]}),
    "a_negative_length": ("kv_lengths", {"kv_lengths": [5, -1]}),
    "packed_without_lengths": ("kv_lengths", {"encoder_hidden_states": PACKED}),
    "packed_with_too_few_tokens": (
        "kv_lengths",
        {"encoder_hidden_states": PACKED, "kv_lengths": [5, 5]},
    ),
    "packed_with_too_many_tokens": (
        "kv_lengths",
        {"encoder_hidden_states": PACKED, "kv_lengths": [5, 3]},
    ),
    "packed_rows_of_another_batch": (
        "kv_lengths",
        {"encoder_hidden_states": PACKED, "kv_lengths": [3, 3, 3]},
    ),
    "packed_queries_without_lengths": ("query_lengths", {"hidden_states": PACKED}),
    "a_mask_of_the_queries_length": ("attention_mask", {"attention_mask": tensor(2, 6, 3, 7)}),
    "self_attention_with_an_encoder": ("encoder_hidden_states", {"kind": SELF}),
    "self_attention_with_lengths_of_keys": (
        "kv_lengths",
        {"kind": SELF, "encoder_hidden_states": None, "kv_lengths": [3, 3]},
    ),
}


def test_the_request_that_is_changed_below_is_good(channel, whisper):
    code, text, _ = messages.answer(channel, f"{ATTENTION}Forward", request().SerializeToString())
    assert code is grpc.StatusCode.OK, text


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(channel, whisper, assert_answers, name):
    field, changes = WRONG[name]
    data = request(**changes).SerializeToString()
    code, text, error = messages.answer(channel, f"{ATTENTION}Forward", data)
    assert code is grpc.StatusCode.INVALID_ARGUMENT, text
    assert error.details["field"] == field, text
    assert_answers()


def test_an_encoder_has_no_layers_that_see_one(channel, whisper):
    data = request(stack="encoder").SerializeToString()
    code, text, error = messages.answer(channel, f"{ATTENTION}Forward", data)
    assert (code, error.reason) == (grpc.StatusCode.NOT_FOUND, "LAYER_NOT_FOUND"), text


def test_a_read_only_question_brings_no_encoder(client, whisper, calls, cross):
    call = calls.cross[0]
    with client.open_session(NAME) as session:
        for brings in (
            {"encoder_hidden_states": calls.encoder_hidden_states[:1]},
            {"kv_lengths": [100]},
        ):
            with pytest.raises(errors.InvalidArgument) as raised:
                cross(
                    call.hidden_states[:1],
                    layer=0,
                    sessions=[session],
                    cache_mode="read_only",
                    **brings,
                )
            assert raised.value.details["field"] == next(iter(brings))
        # Nothing is kept yet: the answer is the bias alone.
        result = cross(call.hidden_states[:1], layer=0, sessions=[session], cache_mode="read_only")
        bias = whisper.model.decoder.layers[0].encoder_attn.out_proj.bias.detach()
        np.testing.assert_allclose(result.output, bias.expand(result.output.shape), atol=1e-6)

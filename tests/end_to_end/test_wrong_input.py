"""Messages with something wrong, through a real socket: refused with the right code each time."""

import grpc
import numpy as np
import pytest

from attnd._proto.attention.v1 import attention_pb2, types_pb2
from end_to_end.messages import (
    ATTENTION,
    BOOL,
    FLOAT16,
    FLOAT32,
    INT8,
    INT32,
    INT64,
    LARGEST,
    MILLION,
    SMALLEST,
    a_slot,
    array_tensor,
    attend,
    execution,
    forward,
    in_shared_memory,
    inline_past,
    layer,
    options,
    tensor,
)

Code = grpc.StatusCode


def test_the_requests_that_are_changed_below_are_good(send):
    assert send(f"{ATTENTION}Attend", attend().SerializeToString()) == (Code.OK, "")
    assert send(f"{ATTENTION}Forward", forward().SerializeToString()) == (Code.OK, "")


# One field is wrong.

WRONG_TENSORS = {
    "query_missing": attend(query=None),
    "key_missing": attend(key=None),
    "value_missing": attend(value=None),
    "no_content": attend(query=types_pb2.Tensor(dtype=FLOAT32, shape=[2, 4, 3, 8])),
    "truncated_data": attend(query=tensor(2, 4, 3, 8, data=bytes(767))),
    "surplus_data": attend(query=tensor(2, 4, 3, 8, data=bytes(769))),
    "negative_dimension": attend(query=tensor(2, -4, 3, 8, data=bytes(768))),
    "two_negative_dimensions": attend(query=tensor(2, -4, -3, 8, data=bytes(768))),
    "smallest_dimension": attend(query=tensor(SMALLEST, 4, 3, 8, data=b"")),
    "largest_dimension": attend(query=tensor(LARGEST, 4, 3, 8, data=b"")),
    "huge_dimensions": attend(query=tensor(2**40, 4, 3, 8, data=bytes(768))),
    "product_overflows_to_zero": attend(query=tensor(2**32, 2**32, 1, 8, data=b"")),
    "product_overflows_to_the_size": attend(query=tensor(2**62 + 2, 4, 3, 8, data=bytes(768))),
    "bytes_overflow_to_zero": attend(query=tensor(2**31, 2**31, 1, 1, data=b"")),
    "overflow_beside_zero": attend(query=tensor(0, LARGEST, LARGEST, 8, data=b"")),
    "huge_beside_zero": attend(query=tensor(LARGEST, 4, 0, 8, data=b"")),
    "rank_0": attend(query=tensor(data=bytes(4))),
    "rank_3": attend(query=tensor(8, 3, 8)),
    "rank_5": attend(query=tensor(1, 2, 4, 3, 8)),
    "rank_of_thousands": attend(query=tensor(*[1] * 5000, data=bytes(4))),
    "no_dtype": attend(query=tensor(2, 4, 3, 8, dtype=0, data=bytes(768))),
    "unknown_dtype": attend(query=tensor(2, 4, 3, 8, dtype=99, data=bytes(768))),
    "int8": attend(query=tensor(2, 4, 3, 8, dtype=INT8)),
    "int64": attend(query=tensor(2, 4, 3, 8, dtype=INT64)),
    "bool": attend(query=tensor(2, 4, 3, 8, dtype=BOOL)),
    "two_dtypes": attend(key=tensor(2, 2, 5, 8, dtype=FLOAT16)),
    "heads_do_not_divide": attend(key=tensor(2, 3, 5, 8), value=tensor(2, 3, 5, 8)),
    "more_kv_heads_than_heads": attend(key=tensor(2, 8, 5, 8), value=tensor(2, 8, 5, 8)),
    "no_kv_heads": attend(key=tensor(2, 0, 5, 8), value=tensor(2, 0, 5, 8)),
    "no_heads": attend(query=tensor(2, 0, 3, 8)),
    "no_head_dim": attend(query=tensor(2, 4, 3, 0), key=tensor(2, 2, 5, 0)),
    "two_head_dims": attend(key=tensor(2, 2, 5, 16)),
    "two_lengths_of_keys": attend(value=tensor(2, 2, 4, 8)),
    "two_numbers_of_kv_heads": attend(value=tensor(2, 4, 5, 8)),
    "two_batches": attend(key=tensor(1, 2, 5, 8), value=tensor(1, 2, 5, 8)),
    "more_tokens_than_allowed": attend(
        query=tensor(2**23, 1, 1, 1, dtype=FLOAT16),
        key=tensor(2**23, 1, 0, 1, dtype=FLOAT16),
        value=tensor(2**23, 1, 0, 1, dtype=FLOAT16),
    ),
    "more_rows_than_allowed": attend(
        query=tensor(2**40, 4, 0, 8), key=tensor(2**40, 2, 0, 8), value=tensor(2**40, 2, 0, 8)
    ),
}

WRONG_MASKS = {
    "batch": tensor(3, 4, 3, 5),
    "heads": tensor(2, 3, 3, 5),
    "q_len": tensor(2, 4, 2, 5),
    "kv_len_too_long": tensor(2, 4, 3, 6),
    "no_keys": tensor(2, 4, 3, 0),
    "no_rows": tensor(2, 4, 0, 5),
    "rank_1": tensor(5),
    "rank_5": tensor(1, 2, 4, 3, 5),
    "int32": tensor(2, 5, dtype=INT32),
    "int64_of_rank_4": tensor(2, 1, 1, 5, dtype=INT64),
    "int64_for_another_batch": tensor(3, 5, dtype=INT64),
    "int64_of_2": array_tensor(np.full((2, 5), 2)),
    "int64_of_-1": array_tensor(np.full((2, 5), -1)),
    "truncated": tensor(2, 4, 3, 5, dtype=BOOL, data=bytes(119)),
    "surplus": tensor(2, 4, 3, 5, dtype=BOOL, data=bytes(121)),
}

WRONG_FIELDS = {
    "query_lengths_of_another_batch": attend(query_lengths=[1, 2, 3]),
    "query_lengths_too_long": attend(query_lengths=[1, 4]),
    "query_lengths_negative": attend(query_lengths=[-1, 3]),
    "query_lengths_smallest": attend(query_lengths=[SMALLEST, 3]),
    "kv_lengths_too_long": attend(kv_lengths=[6, 5]),
    "kv_lengths_largest": attend(kv_lengths=[LARGEST, LARGEST]),
    "first_query_position_of_another_batch": attend(first_query_position=[0]),
    "layout": attend(tensor_layout=17),
    "packed_of_rank_4": attend(tensor_layout=3, query_lengths=[3, 3], kv_lengths=[5, 5]),
    "output_dtype_int64": attend(output_dtype=INT64),
    "output_dtype_unknown": attend(output_dtype=99),
    "stage": attend(output_attentions=True, attention_stage=99),
    "kind": attend(layer=layer(model="weightless", kind=9)),
    "scale_nan": attend(options=options(scale=float("nan"))),
    "scale_inf": attend(options=options(scale=float("inf"))),
    "scale_too_large_for_a_float": attend(options=options(scale=1e300)),
    "soft_cap_negative": attend(options=options(soft_cap=-1.0)),
    "soft_cap_nan": attend(options=options(soft_cap=float("nan"))),
    "window_left": attend(options=options(window_left=-2)),
    "window_right": attend(options=options(window_right=SMALLEST)),
    "alibi_of_another_number_of_heads": attend(options=options(alibi_slopes=[0.1] * 3)),
    "alibi_nan": attend(options=options(alibi_slopes=[float("nan")] * 4)),
    "sinks_of_another_number_of_heads": attend(options=options(sink_logits=[0.1] * 5)),
    "sinks_nan": attend(options=options(sink_logits=[float("nan")] * 4)),
    "sparsity_of_an_exact_implementation": attend(
        execution=execution(implementation="standard", sparsity={"factor": 0.5})
    ),
    "sparsity_factor": attend(execution=execution(sparsity={"factor": 1.0})),
    "sparsity_mass": attend(execution=execution(sparsity={"mass": 0.0})),
    "past_without_value": attend(
        past_key_value=attention_pb2.PastKeyValue(
            inline_kv=attention_pb2.KeyValue(key=tensor(2, 2, 1, 8))
        )
    ),
    "past_of_other_heads": attend(
        past_key_value=inline_past(tensor(2, 4, 1, 8), tensor(2, 4, 1, 8))
    ),
    "past_of_two_lengths": attend(
        past_key_value=inline_past(tensor(2, 2, 1, 8), tensor(2, 2, 2, 8))
    ),
    "past_of_another_batch": attend(
        past_key_value=inline_past(tensor(1, 2, 1, 8), tensor(1, 2, 1, 8))
    ),
    "past_of_another_dtype": attend(
        past_key_value=inline_past(
            tensor(2, 2, 1, 8, dtype=FLOAT16), tensor(2, 2, 1, 8, dtype=FLOAT16)
        )
    ),
    "past_of_rank_1": attend(past_key_value=inline_past(tensor(8), tensor(8))),
    "past_with_kv_lengths": attend(
        kv_lengths=[5, 5], past_key_value=inline_past(tensor(2, 2, 1, 8), tensor(2, 2, 1, 8))
    ),
    "heads_not_the_models": attend(layer=layer(model="weightless")),
    "answer_larger_than_a_message": attend(
        query=tensor(1, 4, 2500, 1), key=tensor(1, 1, 2500, 1), value=tensor(1, 1, 2500, 1),
        output_attentions=True,
    ),
}  # fmt: skip

PACKED = {"query": tensor(6, 4, 8), "key": tensor(9, 2, 8), "value": tensor(9, 2, 8)}
WRONG_PACKED = {
    "no_lengths": {},
    "no_kv_lengths": {"query_lengths": [2, 4]},
    "no_query_lengths": {"kv_lengths": [2, 7]},
    "query_lengths_add_up_to_less": {"query_lengths": [2, 3], "kv_lengths": [2, 7]},
    "query_lengths_add_up_to_more": {"query_lengths": [3, 4], "kv_lengths": [2, 7]},
    "kv_lengths_add_up_to_less": {"query_lengths": [2, 4], "kv_lengths": [2, 6]},
    "lengths_that_overflow": {"query_lengths": [LARGEST, LARGEST, 8], "kv_lengths": [2, 3, 4]},
    "negative": {"query_lengths": [-2, 8], "kv_lengths": [2, 7]},
    "two_batches": {"query_lengths": [2, 4], "kv_lengths": [2, 3, 4]},
}

WRONG_FORWARD = {
    "hidden_states_missing": forward(hidden_states=None),
    "hidden_size": forward(hidden_states=tensor(2, 3, 64)),
    "rank_1": forward(hidden_states=tensor(128)),
    "rank_4": forward(hidden_states=tensor(1, 2, 3, 128)),
    "rows_without_lengths": forward(hidden_states=tensor(6, 128)),
    "rows_of_other_lengths": forward(hidden_states=tensor(6, 128), query_lengths=[2, 3]),
    "int64": forward(hidden_states=tensor(2, 3, 128, dtype=INT64)),
    "truncated_data": forward(hidden_states=tensor(2, 3, 128, data=bytes(3071))),
    "huge_beside_zero": forward(hidden_states=tensor(LARGEST, 0, 128, data=b"")),
    "more_rows_than_allowed": forward(hidden_states=tensor(2**40, 0, 128)),
    "no_model": forward(layer=None),
    "mask_of_another_batch": forward(attention_mask=tensor(3, 3, dtype=INT64)),
    "mask_too_long": forward(attention_mask=tensor(2, 4, dtype=INT64)),
    "query_lengths": forward(query_lengths=[3, 4]),
    "encoder_states_of_self_attention": forward(encoder_hidden_states=tensor(2, 3, 128)),
    "kv_lengths_of_self_attention": forward(kv_lengths=[3, 3]),
    "position_ids_of_another_batch": forward(position_ids=tensor(3, 3, dtype=INT64)),
    "position_ids_int32": forward(position_ids=tensor(2, 3, dtype=INT32)),
    "position_ids_negative": forward(position_ids=array_tensor(np.full((2, 3), -1))),
    "past_of_rank_1": forward(past_key_value=inline_past(tensor(8), tensor(8))),
    "past_of_rank_0": forward(
        past_key_value=inline_past(tensor(data=bytes(4)), tensor(data=bytes(4)))
    ),
    "past_of_huge_length": forward(
        past_key_value=inline_past(
            tensor(2, 0, LARGEST, 32, data=b""), tensor(2, 0, LARGEST, 32, data=b"")
        )
    ),
    "past_of_other_heads": forward(
        past_key_value=inline_past(tensor(2, 2, 1, 32), tensor(2, 2, 1, 32))
    ),
}


@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_wrong_tensors(send, name):
    code, text = send(f"{ATTENTION}Attend", WRONG_TENSORS[name].SerializeToString())
    assert code is Code.INVALID_ARGUMENT, text


@pytest.mark.parametrize("name", WRONG_MASKS)
def test_masks_that_do_not_fit(send, name):
    request = attend(attention_mask=WRONG_MASKS[name])
    code, text = send(f"{ATTENTION}Attend", request.SerializeToString())
    assert code is Code.INVALID_ARGUMENT, text


@pytest.mark.parametrize("name", WRONG_FIELDS)
def test_wrong_fields_of_attend(send, name):
    code, text = send(f"{ATTENTION}Attend", WRONG_FIELDS[name].SerializeToString())
    assert code is Code.INVALID_ARGUMENT, text


@pytest.mark.parametrize("name", WRONG_PACKED)
def test_packed_rows_whose_ends_are_wrong(send, name):
    request = attend(tensor_layout=3, **PACKED, **WRONG_PACKED[name])
    code, text = send(f"{ATTENTION}Attend", request.SerializeToString())
    assert code is Code.INVALID_ARGUMENT, text


@pytest.mark.parametrize("name", WRONG_FORWARD)
def test_wrong_fields_of_forward(send, name):
    code, text = send(f"{ATTENTION}Forward", WRONG_FORWARD[name].SerializeToString())
    assert code is Code.INVALID_ARGUMENT, text


@pytest.mark.parametrize(
    "position", [LARGEST, SMALLEST, 2**41, -(2**41), 2**31], ids=lambda value: str(value)
)
def test_positions_far_away_hide_nothing_or_everything_or_are_refused(send, position):
    for window in ({}, {"window_left": LARGEST, "window_right": LARGEST}, {"is_causal": True}):
        request = attend(first_query_position=[position, 0], options=options(**window))
        code, text = send(f"{ATTENTION}Attend", request.SerializeToString())
        assert code in (Code.OK, Code.INVALID_ARGUMENT), text


@pytest.mark.parametrize("position", [128, 2**40, LARGEST])
def test_positions_beyond_the_models(send, position):
    request = forward(position_ids=array_tensor(np.full((2, 3), position)))
    code, text = send(f"{ATTENTION}Forward", request.SerializeToString())
    assert code is Code.OUT_OF_RANGE, text


NOT_FOUND = {
    "model": layer(model="nothing"),
    "model_of_a_megabyte": layer(model="x" * MILLION),
    "stack": layer(model="hostile", stack="nothing"),
    "layer": layer(model="hostile", layer=2),
    "last_layer": layer(model="hostile", layer=2**32 - 1),
}


@pytest.mark.parametrize("name", NOT_FOUND)
def test_what_is_not_there(send, name):
    for rpc, request in (("Attend", attend), ("Forward", forward)):
        data = request(layer=NOT_FOUND[name]).SerializeToString()
        code, text = send(f"{ATTENTION}{rpc}", data)
        assert code is Code.NOT_FOUND, text
        assert len(text) < 4096


@pytest.mark.parametrize("name", ["no_such", "Standard", "x" * MILLION], ids=len)
def test_an_implementation_that_is_not_there(send, name):
    for rpc, request in (("Attend", attend), ("Forward", forward)):
        data = request(execution=execution(implementation=name)).SerializeToString()
        code, text = send(f"{ATTENTION}{rpc}", data)
        assert code is Code.NOT_FOUND, text


def test_forward_without_weights(send):
    data = forward(layer=layer(model="weightless")).SerializeToString()
    code, text = send(f"{ATTENTION}Forward", data)
    assert code is Code.FAILED_PRECONDITION, text


UNIMPLEMENTED = {
    "attend_shared_memory": attend(query=in_shared_memory(2, 4, 3, 8)),
    "attend_mask_in_shared_memory": attend(attention_mask=in_shared_memory(3, 5)),
    "attend_past_in_shared_memory": attend(
        past_key_value=inline_past(in_shared_memory(2, 2, 1, 8), tensor(2, 2, 1, 8))
    ),
    "forward_shared_memory": forward(hidden_states=in_shared_memory(2, 3, 128)),
    "attend_result_slots": attend(
        results=a_slot(output=types_pb2.SharedMemorySlice(region="r", byte_size=1 << 20))
    ),
    "attend_empty_result_slots": attend(results=a_slot()),
    "forward_result_slots": forward(
        results=a_slot(output=types_pb2.SharedMemorySlice(region="r", byte_size=1 << 20))
    ),
}


@pytest.mark.parametrize("name", UNIMPLEMENTED)
def test_what_is_not_there_yet_is_never_ignored(send, name):
    rpc = "Attend" if name.startswith("attend") else "Forward"
    code, text = send(f"{ATTENTION}{rpc}", UNIMPLEMENTED[name].SerializeToString())
    assert code is Code.UNIMPLEMENTED, text


def test_cross_attention_of_a_model_that_has_none(send):
    kind = types_pb2.ATTENTION_KIND_CROSS
    request = forward(layer=layer(model="hostile", kind=kind))
    code, text = send(f"{ATTENTION}Forward", request.SerializeToString())
    assert code in (Code.NOT_FOUND, Code.UNIMPLEMENTED), text


@pytest.mark.parametrize(
    "rpc",
    [
        f"{ATTENTION}{name}"
        for name in (
            "RegisterSharedMemory",
            "UnregisterSharedMemory",
            "NoSuchMethod",
        )
    ]
    + ["/attention.v1.NoSuchService/Attend"],
)
def test_rpcs_that_are_not_there_yet(send, rpc):
    code, text = send(rpc, b"")
    assert code is Code.UNIMPLEMENTED, text

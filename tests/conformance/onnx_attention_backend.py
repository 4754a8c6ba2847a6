"""ONNX models of one Attention node, executed by a running attnd.

The operator's options are the API's own, with these differences: ONNX counts a query's position
from the keys' beginning (past keys before it) unless nonpad_kv_seqlen is given, the API from the
end; 3-D tensors are tokens first, but past and present stay heads first; a mask that is too short
always hides the rest.
"""

import numpy as np
import onnx
from onnx.backend.base import Backend, BackendRep

INPUTS = ("Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen")
OUTPUTS = ("Y", "present_key", "present_value", "qk_matmul_output")
STAGES = ("scaled", "soft_capped", "masked", "probabilities")


class AttentionNode(BackendRep):
    def __init__(self, client, node, implementation):
        self._client = client
        self._implementation = implementation
        self._inputs = [name for given, name in zip(node.input, INPUTS, strict=False) if given]
        self._outputs = [name for given, name in zip(node.output, OUTPUTS, strict=False) if given]
        self._attributes = {
            attribute.name: onnx.helper.get_attribute_value(attribute)
            for attribute in node.attribute
        }

    def run(self, inputs, **kwargs):
        given = dict(zip(self._inputs, inputs, strict=True))
        # The API has no double precision: such a case is computed, and compared, in single.
        as_double = given["Q"].dtype == np.float64
        if as_double:
            given = {
                name: array.astype(np.float32) if array.dtype == np.float64 else array
                for name, array in given.items()
            }
        results = self._attend(given)
        outputs = [results[name] for name in self._outputs]
        return tuple(array.astype(np.float64) for array in outputs) if as_double else outputs

    def _attend(self, given):
        attributes = self._attributes
        query, key, value = (given[name] for name in ("Q", "K", "V"))
        past = [given[name] for name in ("past_key", "past_value") if name in given]
        tokens_first = query.ndim == 3
        if tokens_first:
            query = _split_heads(query, attributes["q_num_heads"])
            key, value = (_split_heads(x, attributes["kv_num_heads"]) for x in (key, value))
            past = [array.swapaxes(1, 2) for array in past]
        length = 1 if tokens_first else 2
        past_length = past[0].shape[length] if past else 0
        kv_len = past_length + key.shape[length]

        arguments = {}
        if "nonpad_kv_seqlen" in given:
            arguments["kv_lengths"] = given["nonpad_kv_seqlen"].tolist()
            kv_len = max(arguments["kv_lengths"])
        else:
            arguments["first_query_position"] = [past_length] * len(query)
        if past:
            arguments["past_key"], arguments["past_value"] = past
        if "attn_mask" in given:
            arguments["attention_mask"] = _mask(given["attn_mask"], kv_len)
        if "qk_matmul_output" in self._outputs:
            arguments["output_attentions"] = True
            arguments["attention_stage"] = STAGES[attributes.get("qk_matmul_output_mode", 0)]
        result = self._client.attend(
            query,
            key,
            value,
            layout="tokens_first" if tokens_first else "heads_first",
            scale=attributes.get("scale"),
            is_causal=bool(attributes.get("is_causal", 0)),
            window_left=attributes.get("left_window_size", -1),
            window_right=attributes.get("right_window_size", -1),
            soft_cap=attributes.get("softcap", 0.0),
            use_cache="present_key" in self._outputs,
            implementation=self._implementation,
            **arguments,
        )
        output, present = result.output, [result.present_key, result.present_value]
        if tokens_first:
            output = output.reshape(*output.shape[:2], -1)
            present = [None if array is None else array.swapaxes(1, 2) for array in present]
        return {
            "Y": output,
            "present_key": present[0],
            "present_value": present[1],
            "qk_matmul_output": result.attention_weights,
        }


def _split_heads(array, heads):
    return array.reshape(*array.shape[:2], heads, -1)


def _mask(mask, kv_len):
    """Of rank 2 at least, and no longer than the longest row of keys."""
    mask = mask.reshape((1,) * (2 - mask.ndim) + mask.shape)
    if mask.shape[-1] == 1 < kv_len:
        hidden = False if mask.dtype == np.bool_ else -np.inf
        missing = [(0, 0)] * (mask.ndim - 1) + [(0, 1)]
        return np.pad(mask, missing, constant_values=hidden)
    return mask[..., :kv_len]


class AttndBackend(Backend):
    """Made for one server: `client` is set before anything is prepared."""

    client = None

    @classmethod
    def supports_device(cls, device):
        return device == "CPU"

    @classmethod
    def prepare(cls, model, device="CPU", implementation="", **kwargs):
        super().prepare(model, device, **kwargs)
        (node,) = model.graph.node
        if node.op_type != "Attention":
            raise NotImplementedError(f"{node.op_type} is no operator of this backend")
        return AttentionNode(cls.client, node, implementation)

"""onnxruntime on the CPU: the Attention operator of opset 23, and the contributed operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from .system import InTurn, Peer, Unsupported, fastest, load, visible_mask

Prepared = Callable[[], Any]
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}


class OnnxruntimeAttention(Peer):
    def __init__(self, threads: int) -> None:
        super().__init__()
        self._threads = threads

    def describe(self) -> dict[str, Any]:
        return {"version": onnxruntime.__version__}

    def prepare(
        self, slot: str, problem: dict[str, Any], files: dict[str, str]
    ) -> dict[str, Any] | None:
        if problem["dtype"] not in TYPES:
            raise Unsupported(f"no attention in {problem['dtype']} on the CPU")
        arrays = load(problem, files)
        name, call = fastest(self._variants(problem, arrays), _as_array(problem))
        self._slots[slot] = (call, _as_array(problem))
        return {"settings": name}

    def _variants(
        self, p: dict[str, Any], arrays: dict[str, np.ndarray]
    ) -> list[tuple[str, Callable[[], Prepared]]]:
        variants = [("Attention", lambda: self._attention(p, arrays))]
        if p["num_heads"] == p["num_kv_heads"] and visible_mask(p) is None:
            variants.append(("MultiHeadAttention", lambda: self._multi_head(p, arrays)))
        if p["q_len"] == 1 or (p["is_causal"] and p["q_len"] == p["kv_len"]):
            variants.append(("GroupQueryAttention", lambda: self._group_query(p, arrays)))
        return variants

    def _session(self, node: Any, inputs: dict[str, Any], outputs: list[str], kind: int) -> Any:
        types = {np.dtype(np.int32): TensorProto.INT32, np.dtype(bool): TensorProto.BOOL}
        graph = helper.make_graph(
            [node],
            "attention",
            [
                helper.make_tensor_value_info(n, types.get(a.dtype, kind), a.shape)
                for n, a in inputs.items()
            ],
            [helper.make_tensor_value_info(n, kind, None) for n in outputs],
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)],
            ir_version=10,
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 4
        # Threads spin within a run as they do by default, and not for 60 ms after it.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def _bound(self, session: Any, inputs: dict[str, np.ndarray], copies: int) -> Prepared:
        """Runs with inputs bound beforehand, large ones in copies used in turn."""

        def binding(copy: bool) -> Any:
            bound = session.io_binding()
            for name, array in inputs.items():
                bound.bind_cpu_input(name, array.copy() if copy else array)
            bound.bind_output("output", "cpu")
            return bound

        bindings = InTurn([binding(i > 0) for i in range(copies)])

        def call() -> Any:
            bound = bindings()
            session.run_with_iobinding(bound)
            return bound.get_outputs()[0]

        return call

    def _attention(self, p: dict[str, Any], arrays: dict[str, np.ndarray]) -> Prepared:
        inputs, mask = dict(arrays), visible_mask(p)
        if mask is not None:
            inputs["mask"] = mask
        causal = int(p["is_causal"] and mask is None)
        node = helper.make_node("Attention", list(inputs), ["output"], is_causal=causal)
        session = self._session(node, inputs, ["output"], TYPES[p["dtype"]])
        return self._bound(session, inputs, p["cache_copies"])

    def _multi_head(self, p: dict[str, Any], arrays: dict[str, np.ndarray]) -> Prepared:
        packed = {name: _tokens_first(array) for name, array in arrays.items()}
        node = helper.make_node(
            "MultiHeadAttention",
            ["query", "key", "value"],
            ["output"],
            domain="com.microsoft",
            num_heads=p["num_heads"],
            unidirectional=int(p["is_causal"]),
        )
        session = self._session(node, packed, ["output"], TYPES[p["dtype"]])
        return self._bound(session, packed, p["cache_copies"])

    def _group_query(self, p: dict[str, Any], arrays: dict[str, np.ndarray]) -> Prepared:
        """With an own cache: one new token (decoding) is appended in place, or all of them are."""
        past = p["kv_len"] - p["q_len"]
        inputs = {
            "query": _tokens_first(arrays["query"]),
            "key": _tokens_first(arrays["key"][:, :, past:]),
            "value": _tokens_first(arrays["value"][:, :, past:]),
            "past_key": arrays["key"] if past else arrays["key"][:, :, :0],
            "past_value": arrays["value"] if past else arrays["value"][:, :, :0],
            "seqlens_k": np.full(p["batch"], p["kv_len"] - 1, np.int32),
            "total_sequence_length": np.array([p["kv_len"]], np.int32),
        }
        node = helper.make_node(
            "GroupQueryAttention",
            list(inputs),
            ["output", "present_key", "present_value"],
            domain="com.microsoft",
            num_heads=p["num_heads"],
            kv_num_heads=p["num_kv_heads"],
        )
        outputs = ["output", "present_key", "present_value"]
        session = self._session(node, inputs, outputs, TYPES[p["dtype"]])

        def binding(copy: bool) -> Any:
            bound = session.io_binding()
            for name, array in inputs.items():
                if past and name.startswith("past_"):
                    value = onnxruntime.OrtValue.ortvalue_from_numpy(array.copy())
                    bound.bind_ortvalue_input(name, value)
                    bound.bind_ortvalue_output(name.replace("past", "present"), value)
                else:
                    bound.bind_cpu_input(name, array)
            for name in outputs if not past else ["output"]:
                bound.bind_output(name, "cpu")
            return bound

        bindings = InTurn([binding(i > 0) for i in range(p["cache_copies"])])

        def call() -> Any:
            bound = bindings()
            session.run_with_iobinding(bound)
            return bound.get_outputs()[outputs.index("output") if not past else -1]

        return call


def _tokens_first(array: np.ndarray) -> np.ndarray:
    """[batch, heads, length, dim] as [batch, length, heads * dim]."""
    batch, heads, length, dim = array.shape
    return np.ascontiguousarray(array.transpose(0, 2, 1, 3)).reshape(batch, length, heads * dim)


def _as_array(p: dict[str, Any]) -> Callable[[Any], np.ndarray]:
    def convert(output: Any) -> np.ndarray:
        array: np.ndarray = output.numpy()
        if array.ndim == 3:
            tokens = array.reshape(p["batch"], p["q_len"], p["num_heads"], p["value_dim"])
            array = tokens.transpose(0, 2, 1, 3)
        return array

    return convert


def create(threads: int) -> OnnxruntimeAttention:
    return OnnxruntimeAttention(threads)

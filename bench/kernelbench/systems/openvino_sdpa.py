"""OpenVINO's ScaledDotProductAttention on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from .system import InTurn, Peer, as_float32, fastest, load, visible_mask

Prepared = Callable[[], Any]
TYPES = {"float32": ov.Type.f32, "bfloat16": ov.Type.bf16, "float16": ov.Type.f16}
NAMES = ("query", "key", "value")


class OpenvinoSdpa(Peer):
    def __init__(self, threads: int) -> None:
        super().__init__()
        self._core = ov.Core()
        self._threads = threads

    def describe(self) -> dict[str, Any]:
        return {"version": ov.__version__}

    def prepare(
        self, slot: str, problem: dict[str, Any], files: dict[str, str]
    ) -> dict[str, Any] | None:
        p = problem
        arrays = load(p, files)
        group = p["num_heads"] // p["num_kv_heads"]
        # A precision that the CPU has no instructions for is refused, or slower: float32 instead.
        precisions = dict.fromkeys([TYPES[p["dtype"]], ov.Type.f32])
        variants = [
            (f"{name}, inference in {kind.get_type_name()}", self._prepared(p, arrays, fold, kind))
            for kind in precisions
            for name, fold in (("plain" if group == 1 else "broadcast", False), ("folded", True))
            if not fold or (group > 1 and p["q_len"] == 1)
        ]
        name, call = fastest(variants, _as_array(p))
        self._slots[slot] = (call, _as_array(p))
        return {"settings": name}

    def _prepared(
        self, p: dict[str, Any], arrays: dict[str, np.ndarray], fold: bool, precision: Any
    ) -> Callable[[], Prepared]:
        def prepare() -> Prepared:
            kind = TYPES[p["dtype"]]
            given = dict(arrays)
            if fold:  # heads that share keys become rows: the same function, for one query
                given["query"] = given["query"].reshape(
                    p["batch"], p["num_kv_heads"], -1, p["head_dim"]
                )
            compiled = self._core.compile_model(
                _model(p, given, kind, fold),
                "CPU",
                {
                    "INFERENCE_PRECISION_HINT": precision,
                    "INFERENCE_NUM_THREADS": self._threads,
                    "PERFORMANCE_HINT": "LATENCY",
                    "NUM_STREAMS": 1,
                },
            )
            request = compiled.create_infer_request()
            caches = InTurn([_tensors(given, kind, i > 0) for i in range(p["cache_copies"])])

            def call() -> Any:
                for index, tensor in enumerate(caches()):
                    request.set_input_tensor(index, tensor)
                request.infer()
                return request.get_output_tensor(0)

            return call

        return prepare


def _tensors(arrays: dict[str, np.ndarray], kind: Any, copy: bool) -> list[Any]:
    tensors = []
    for name in NAMES:
        array = arrays[name].copy() if copy else arrays[name]
        tensors.append(ov.Tensor(array, array.shape, kind))
    return tensors


def _model(p: dict[str, Any], arrays: dict[str, np.ndarray], kind: Any, fold: bool) -> Any:
    parameters = [ops.parameter(arrays[name].shape, kind, name=name) for name in NAMES]
    query, key, value = parameters
    group = p["num_heads"] // p["num_kv_heads"]
    if group > 1 and not fold:
        key, value = (_expanded(p, node, group) for node in (key, value))
    mask = visible_mask(p)
    if mask is None:
        attention = ops.scaled_dot_product_attention(query, key, value, causal=p["is_causal"])
    else:
        attention = ops.scaled_dot_product_attention(query, key, value, ops.constant(mask))
    return ov.Model([attention], parameters, "attention")


def _expanded(p: dict[str, Any], node: Any, group: int) -> Any:
    """Each KV head repeated for its query heads, as exported models say it."""
    batch, heads, length, dim = node.get_output_shape(0)
    wide = ops.broadcast(
        ops.unsqueeze(node, np.array([2])), np.array([batch, heads, group, length, dim])
    )
    return ops.reshape(wide, np.array([batch, heads * group, length, dim]), False)


def _as_array(p: dict[str, Any]) -> Callable[[Any], np.ndarray]:
    extents = (p["batch"], p["num_heads"], p["q_len"], p["value_dim"])

    def convert(tensor: Any) -> np.ndarray:
        if tensor.element_type == ov.Type.bf16:
            raw = np.array(tensor.data).view(np.uint16).copy()
            return as_float32(raw, "bfloat16").reshape(extents)
        return np.array(tensor.data).reshape(extents)

    return convert


def create(threads: int) -> OpenvinoSdpa:
    return OpenvinoSdpa(threads)

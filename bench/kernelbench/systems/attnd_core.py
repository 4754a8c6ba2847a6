"""Ours: the implementations through core, and the machine's limits, by libattn_bench.so."""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from .system import RAW_DTYPES, Unsupported, as_float32, load

ROOT = Path(__file__).resolve().parents[3]
WORKSPACE_LIMIT = 8 << 30


class AttndCore:
    def __init__(self, threads: int) -> None:
        path = os.environ.get(
            "ATTN_BENCH_LIBRARY", str(ROOT / "build/release/lib/libattn_bench.so")
        )
        self._library = ctypes.CDLL(path)
        self._library.attn_bench_open.restype = ctypes.c_void_p
        self._library.attn_bench_open.argtypes = [ctypes.c_int, ctypes.c_uint64]
        self._library.attn_bench_call.restype = ctypes.c_char_p
        self._library.attn_bench_call.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
        self._bench = self._library.attn_bench_open(threads, WORKSPACE_LIMIT)
        if not self._bench:
            raise Unsupported("attn_bench_open failed")
        self._problems: dict[str, dict[str, Any]] = {}

    def _call(self, op: str, **request: Any) -> dict[str, Any]:
        reply: dict[str, Any] = json.loads(
            self._library.attn_bench_call(self._bench, json.dumps({"op": op, **request}).encode())
        )
        if "error" in reply:
            if reply["unsupported"]:
                raise Unsupported(reply["error"])
            raise RuntimeError(reply["error"])
        return reply

    def describe(self) -> dict[str, Any]:
        return self._call("describe")

    def prepare(self, slot: str, problem: dict[str, Any], files: dict[str, str]) -> dict[str, Any]:
        arrays = load(problem, files)
        self._call(
            "make", slot=slot, shape=problem, **{n: a.ctypes.data for n, a in arrays.items()}
        )
        self._problems[slot] = problem
        return {}

    def run(self, slot: str, **request: Any) -> dict[str, Any]:
        return self._call("run", slot=slot, **request)

    def recovery(self, slot: str, **request: Any) -> dict[str, Any]:
        return self._call("recovery", slot=slot, **request)

    def output(self, slot: str, path: str) -> None:
        """Of the last run."""
        p = self._problems[slot]
        raw = np.empty(
            (p["batch"], p["num_heads"], p["q_len"], p["value_dim"]), RAW_DTYPES[p["dtype"]]
        )
        self._call("output", slot=slot, to=raw.ctypes.data, bytes=raw.nbytes)
        as_float32(raw, p["dtype"]).tofile(path)

    def release(self, slot: str) -> None:
        self._problems.pop(slot, None)
        self._call("release", slot=slot)

    def long_document(self, shape: dict[str, int], seed: int, files: dict[str, str]) -> None:
        """Writes data with the structure of long documents (bench/long_document.h) as float32."""
        heads = {"query": "num_heads", "key": "num_kv_heads", "value": "num_kv_heads"}
        dims = {"query": "head_dim", "key": "head_dim", "value": "value_dim"}
        arrays = {
            name: np.empty(
                (shape["batch"], shape[heads[name]], shape["q_len"], shape[dims[name]]), np.float32
            )
            for name in files
        }
        addresses = {name: array.ctypes.data for name, array in arrays.items()}
        self._call("long_document", shape=shape, seed=seed, **addresses)
        for name, path in files.items():
            arrays[name].tofile(path)

    def limit(self, which: str, seconds: float) -> dict[str, Any]:
        return self._call("limit", which=which, seconds=seconds)


def create(threads: int) -> AttndCore:
    return AttndCore(threads)

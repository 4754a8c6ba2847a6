"""PyTorch's scaled_dot_product_attention on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from .system import InTurn, Peer, fastest, load, visible_mask

Prepared = Callable[[], Any]


class TorchSdpa(Peer):
    def __init__(self, threads: int) -> None:
        super().__init__()
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)

    def describe(self) -> dict[str, Any]:
        return {"version": torch.__version__}

    def prepare(
        self, slot: str, problem: dict[str, Any], files: dict[str, str]
    ) -> dict[str, Any] | None:
        arrays = load(problem, files)
        query, key, value = (
            _tensor(arrays[n], problem["dtype"]) for n in ("query", "key", "value")
        )
        caches = InTurn(
            [(key, value)]
            + [(key.clone(), value.clone()) for _ in range(problem["cache_copies"] - 1)]
        )
        name, call = fastest(_variants(problem, query, caches), _as_array(problem))
        self._slots[slot] = (call, _as_array(problem))
        return {"settings": name}


def _tensor(array: np.ndarray, dtype: str) -> torch.Tensor:
    if dtype == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _as_array(problem: dict[str, Any]) -> Callable[[torch.Tensor], np.ndarray]:
    extents = (problem["batch"], problem["num_heads"], problem["q_len"], problem["value_dim"])

    def convert(output: torch.Tensor) -> np.ndarray:
        array: np.ndarray = output.float().reshape(extents).numpy()
        return array

    return convert


def _variants(
    problem: dict[str, Any], query: torch.Tensor, caches: InTurn
) -> list[tuple[str, Callable[[], Prepared]]]:
    group = problem["num_heads"] // problem["num_kv_heads"]
    visible = visible_mask(problem)
    mask = None if visible is None else torch.from_numpy(visible)
    causal = problem["is_causal"] and mask is None

    def plain() -> Any:
        key, value = caches()
        return scaled_dot_product_attention(
            query, key, value, mask, is_causal=causal, enable_gqa=group > 1
        )

    def expanded() -> Any:
        key, value = (t.repeat_interleave(group, dim=1) for t in caches())
        return scaled_dot_product_attention(query, key, value, mask, is_causal=causal)

    def folded() -> Any:
        key, value = caches()
        shape = (problem["batch"], problem["num_kv_heads"], group, problem["head_dim"])
        return scaled_dot_product_attention(query.view(shape), key, value)

    variants = [("enable_gqa" if group > 1 else "plain", lambda: plain)]
    if group > 1:
        variants.append(("keys and values expanded", lambda: expanded))
        if problem["q_len"] == 1:
            variants.append(("heads that share keys as rows", lambda: folded))
    return variants


def create(threads: int) -> TorchSdpa:
    return TorchSdpa(threads)

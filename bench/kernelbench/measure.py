"""Measures one row: correctness first, then limit, ours, limit, peer, limit, ours, ... in turn."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from .inputs import NAMES, SHARED_FOLDER, SharedInputs, extents, gaussian
from .machine import ForeignLoad, wait_until_idle
from .reference import Reference
from .shapes import Contender, Row, problem_of
from .statistics import Samples, best_peer, ratio
from .workers import Worker, WorkerError

# Short executions are repeated within a sample, after an untimed one, until they took this long.
SAMPLE_SECONDS = 0.04
# Rows during which others took more of the cores than this are remarked on.
FOREIGN_SHARE = 0.05
# A peer whose RMS error is more than this share of the result's own RMS computed something else.
WRONG_SHARE = 0.05
SEED = 20_240_601
# Tasks of which the attention that they keep is compared with an oracle's.
RECOVERY_TASKS = 48


@dataclass
class Prepared:
    contender: Contender
    worker: Worker
    slot: str
    warm: bool = True
    first_seconds: float = 0.0
    settings: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    used: dict[str, Any] = field(default_factory=dict)
    samples: Samples = field(default_factory=Samples)

    def run(self, min_seconds: float) -> float:
        ours: dict[str, Any] = {}
        if self.contender.system == "attnd":
            ours["implementation"] = self.contender.implementation
            ours["options"] = self.contender.options
        reply = self.worker.call(
            "run", slot=self.slot, repeats=1, min_seconds=min_seconds, warm=self.warm, **ours
        )
        self.used = {k: v for k, v in reply.items() if k != "seconds"}
        return median(reply["seconds"])


class Measurement:
    """The workers, and what every row is measured with."""

    def __init__(
        self, workers: dict[str, Worker], repeats: int, quick: bool, say: Callable[[str], None]
    ) -> None:
        self.workers = workers
        self.repeats = repeats
        self.limit_seconds = 0.004 if quick else 0.02
        self.sample_seconds = 0.005 if quick else SAMPLE_SECONDS
        self.say = say

    def limit(self, which: str) -> float:
        reply = self.workers["attnd"].call("limit", which=which, seconds=self.limit_seconds)
        return float(reply["per_second"])

    def row(self, row: Row) -> list[dict[str, Any]]:
        """Our row of the JSON, then those beside it. Empty where ours can't do it."""
        inputs = SharedInputs(self._data(row))
        prepared: list[Prepared] = []
        try:
            for contender in (row.subject, *row.own, *row.peers):
                one = self._prepare(row, contender, inputs, f"slot{len(prepared)}")
                if one is not None:
                    prepared.append(one)
                elif contender is row.subject:
                    return []
            checked = self._checked(row, prepared, inputs)
            load = ForeignLoad([os.getpid(), *(w.pid for w in self.workers.values())])
            pairs = self._interleave(row, checked)
            foreign = load.share()
            if row.subject.options and row.bench == "sparse":
                checked[0].used |= checked[0].worker.call(
                    "recovery",
                    slot=checked[0].slot,
                    options=row.subject.options,
                    samples=RECOVERY_TASKS,
                )
            if foreign > FOREIGN_SHARE:
                self.say(f"  others took {foreign:.0%} of the cores' time during this row")
            return _fields_of_all(row, checked, pairs, foreign)
        finally:
            for one in prepared:
                one.worker.release(one.slot)
            inputs.close()

    def _data(self, row: Row) -> dict[str, np.ndarray]:
        if row.data == "gaussian":
            return gaussian(row.shape, SEED)
        with tempfile.TemporaryDirectory(prefix="kernelbench-", dir=SHARED_FOLDER) as folder:
            files = {name: str(Path(folder) / name) for name in NAMES}
            self.workers["attnd"].call(row.data, shape=asdict(row.shape), seed=SEED, files=files)
            sizes = extents(row.shape)
            return {
                name: np.fromfile(path, np.float32).reshape(sizes[name])
                for name, path in files.items()
            }

    def _prepare(
        self, row: Row, contender: Contender, inputs: SharedInputs, slot: str
    ) -> Prepared | None:
        worker = self.workers.get(contender.system)
        if worker is None:
            return None
        one = Prepared(contender, worker, slot)
        try:
            worker.ensure_running()
            reply = worker.call(
                "prepare",
                slot=slot,
                problem=problem_of(row, contender),
                files=inputs.files(contender.dtype),
            )
            one.settings = reply.get("settings", "")
            one.warm = False
            one.first_seconds = one.run(0)
            # Long executions need no untimed one before each: this was theirs.
            one.warm = one.first_seconds < self.sample_seconds
        except WorkerError as error:
            kind = "not available" if error.unsupported else "failed"
            self.say(f"  {contender.label}: {kind}: {error}")
            return None
        return one

    def _checked(self, row: Row, prepared: list[Prepared], inputs: SharedInputs) -> list[Prepared]:
        """With the errors of their outputs; without the peers whose results are wrong."""
        references: dict[str, Reference] = {}
        sizes = extents(row.shape)["output"]
        right = []
        for one in prepared:
            dtype = one.contender.dtype
            if dtype not in references:
                references[dtype] = Reference(row.shape, row.causal, inputs.rounded(dtype))
            path = inputs.output_file()
            one.worker.call("output", slot=one.slot, path=str(path))
            output = np.fromfile(path, np.float32).reshape(sizes)
            errors = references[dtype].errors(output)
            one.errors = errors.fields()
            ours = one.contender.system == "attnd"
            if ours or errors.rms <= WRONG_SHARE * errors.reference_rms:
                right.append(one)
            else:
                self.say(
                    f"  {one.contender.label}: left out, its result is wrong ({errors.rms:.1e})"
                )
        return right

    def _interleave(
        self, row: Row, prepared: list[Prepared]
    ) -> dict[str, list[tuple[float, float]]]:
        """Samples of everyone, and for each other contender the pairs (our seconds, its)."""
        subject, others = prepared[0], prepared[1:]
        pairs: dict[str, list[tuple[float, float]]] = {p.contender.label: [] for p in others}
        which = row.limit()
        before = self.limit(which)

        def sample(one: Prepared) -> float:
            nonlocal before
            seconds = one.run(self.sample_seconds)
            wait_until_idle(one.worker.pid)
            after = self.limit(which)
            one.samples.add(seconds, (before + after) / 2)
            before = after
            return seconds

        if row.once:
            subject.samples.add(subject.first_seconds, before)
            return pairs
        for _ in range(row.repeats or self.repeats):
            if not others:
                sample(subject)
            for other in others:
                ours = sample(subject)
                pairs[other.contender.label].append((ours, sample(other)))
        return pairs


def _fields_of_all(
    row: Row,
    prepared: list[Prepared],
    pairs: dict[str, list[tuple[float, float]]],
    foreign: float,
) -> list[dict[str, Any]]:
    peers = {p.contender.label: p for p in prepared if p.contender in row.peers}
    ratios = {label: ratio(values) for label, values in pairs.items()}
    best = best_peer({label: peer.samples.seconds for label, peer in peers.items()})
    ours = _fields(row, prepared[0])
    ours.update(
        ratio_to_best_peer=ratios[best] if best else None,
        best_peer=best,
        ratios=ratios,
        beside=None,
        foreign_cpu_share=foreign,
    )
    return [ours] + [_fields(row, other) for other in prepared[1:]]


def _fields(row: Row, one: Prepared) -> dict[str, Any]:
    contender = one.contender
    work = row.work()
    if row.cached:
        work = float(row.shape.cache_bytes(contender.cache_dtype))
    return {
        "bench": row.bench,
        "shape": row.name,
        "extents": asdict(row.shape),
        "dtype": contender.dtype,
        "cache_dtype": contender.cache_dtype or None,
        "causal": row.causal,
        "system": contender.system,
        "implementation": contender.implementation or None,
        "options": contender.options,
        "settings": one.settings or None,
        "beside": row.title,  # the row that this one was measured for; null: it is that row
        **one.samples.summary(work),
        "rate_per_second": work / median(one.samples.seconds),
        "ratio_to_best_peer": None,
        "best_peer": None,
        "ratios": {},
        **one.errors,
        **one.used,
    }

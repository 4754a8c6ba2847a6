"""One point: every exact implementation that can, in turn, and what the selector takes."""

from __future__ import annotations

import statistics
from typing import Any

from .core import SLOT, SelectorCore
from .grid import Point

SAMPLE_SECONDS = 0.002  # short executions are repeated within a sample
HOPELESS = 4.0  # times slower than the fastest at first sight: not measured further
SMALL_SECONDS = 50e-6  # from here down the bar is absolute
SMALL_SLACK_SECONDS = 10e-6
WORST_RATIO = 1.2


def measure(core: SelectorCore, point: Point, seconds: float, most_rounds: int) -> dict[str, Any]:
    """`seconds`: what its samples may take, about."""
    core.make(point)
    chosen = core.select()
    names = [c["implementation"] for c in chosen["candidates"] if c["eligible"] and c["exact"]]
    first: dict[str, float] = {}
    for name in names:
        core.run(SLOT, implementation=name, warm=False)
        first[name] = core.run(SLOT, implementation=name, warm=False)["seconds"][0]
    bound = HOPELESS * min(first.values())
    measured = [name for name in names if first[name] <= bound or name == chosen["implementation"]]
    cost = sum(max(first[name], SAMPLE_SECONDS) for name in measured)
    rounds = max(3, min(most_rounds, int(seconds / cost)))
    samples: dict[str, list[float]] = {name: [] for name in measured}
    for i in range(rounds):
        for name in measured if i % 2 == 0 else reversed(measured):
            reply = core.run(SLOT, implementation=name, min_seconds=SAMPLE_SECONDS, warm=False)
            samples[name].append(statistics.median(reply["seconds"]))
    medians = {name: statistics.median(values) for name, values in samples.items()}
    return {
        "point": point.problem(),
        "title": point.title(),
        "chosen": chosen["implementation"],
        "reason": chosen["reason"],
        "cached_seconds": chosen["cached_seconds"],
        "candidates": chosen["candidates"],
        "seconds": {**{n: first[n] for n in names if n not in medians}, **medians},
        "rounds": rounds,
    }


def ratio(row: dict[str, Any]) -> float:
    """`auto` / fastest; below 50 us the slack of 10 us is taken off first."""
    fastest = min(row["seconds"].values())
    auto = row["seconds"][row["chosen"]]
    if fastest < SMALL_SECONDS:
        auto = max(fastest, auto - SMALL_SLACK_SECONDS)
    return float(auto / fastest)

"""From samples that were taken in turn to shares and ratios."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median


def percentile(values: list[float], share: float) -> float:
    """Linear between the two values around the place; the only one where there is one."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


@dataclass
class Samples:
    """Of one contender: seconds, and the limit's rates just before and after each of them."""

    seconds: list[float] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)

    def add(self, seconds: float, limit: float) -> None:
        self.seconds.append(seconds)
        self.limits.append(limit)

    def share(self, work: float) -> float:
        """Median over the pairs of (work per second / limit measured beside it)."""
        return median(work / s / r for s, r in zip(self.seconds, self.limits, strict=True))

    def summary(self, work: float) -> dict[str, float]:
        return {
            "median_seconds": median(self.seconds),
            "p95_seconds": percentile(self.seconds, 0.95),
            "share_of_limit": self.share(work),
            "limit_per_second": median(self.limits),
            "samples": len(self.seconds),
        }


def ratio(pairs: list[tuple[float, float]]) -> float:
    """Median over interleaved pairs of (the other's seconds / ours): above 1, ours is faster."""
    return median(other / ours for ours, other in pairs)


def best_peer(seconds: dict[str, list[float]]) -> str | None:
    """The peer with the lowest median."""
    measured = {name: median(values) for name, values in seconds.items() if values}
    return min(measured, key=measured.__getitem__) if measured else None

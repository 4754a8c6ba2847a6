"""`scripts/bench selector`: a grid of shapes, what `auto` takes of each, and the fastest."""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from . import grid
from .core import SelectorCore
from .measure import WORST_RATIO, measure, ratio

MEAN_RATIO = 1.05
SHOWN = 15


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench selector",
        description="Times every exact implementation on a grid of shapes, interleaved, and holds "
        "what 'auto' takes against the fastest. Prints the worst points and a summary. Exit code 1 "
        f"where auto is beyond {WORST_RATIO} times the fastest, or {MEAN_RATIO} in the geometric "
        "mean (below 50 us: 10 us absolute).",
    )
    parser.add_argument("--quick", action="store_true", help="a small grid: shows that it runs")
    parser.add_argument("--json", metavar="FILE", type=Path, help="writes the measurements there")
    parser.add_argument("--sample", metavar="N", type=int, help="N of the grid's points, seeded")
    parser.add_argument(
        "--random", metavar="N", type=int, default=0, help="N random shapes instead of the grid"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--learn",
        metavar="N",
        type=int,
        default=0,
        help="first records the timings of N of the grid's points, as BenchmarkAttention does",
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="of samples for a point, about")
    parser.add_argument("--rounds", type=int, default=9, help="at most")
    parser.add_argument("--minutes", type=float, help="stops after the point that reaches this")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    return parser.parse_args(argv)


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return grid.MOST_TENSOR_BYTES


def _points(options: argparse.Namespace) -> tuple[list[grid.Point], int]:
    """The points to measure, and how many of the grid's were left out for their size."""
    if options.random:
        return grid.random_points(options.random, options.seed), 0
    whole = grid.grid(options.quick)
    kept = [point for point in whole if grid.fits(point, _available_bytes() // 4)]
    left_out = len(whole) - len(kept)
    if options.sample is not None:
        kept = random.Random(options.seed).sample(kept, min(options.sample, len(kept)))
    return kept, left_out


def _learn(core: SelectorCore, options: argparse.Namespace) -> None:
    known = [p for p in grid.grid(options.quick) if grid.fits(p, grid.MOST_TENSOR_BYTES)]
    chosen = random.Random(options.seed + 1).sample(known, min(options.learn, len(known)))
    for point in chosen:
        row = measure(core, point, options.seconds / 4, 3)
        for name, seconds in row["seconds"].items():
            core.learn(name, seconds)


def _summary(rows: list[dict[str, Any]], left_out: int) -> dict[str, Any]:
    ratios = [ratio(row) for row in rows]
    return {
        "points": len(rows),
        "left_out": left_out,
        "worst": max(ratios),
        "geometric_mean": math.exp(statistics.fmean(map(math.log, ratios))),
        "beyond": sum(value > WORST_RATIO for value in ratios),
        "cached_us_median": 1e6 * statistics.median(row["cached_seconds"] for row in rows),
        "cached_us_worst": 1e6 * max(row["cached_seconds"] for row in rows),
        "fastest": {
            name: sum(min(row["seconds"], key=row["seconds"].get) == name for row in rows)
            for name in sorted({name for row in rows for name in row["seconds"]})
        },
    }


def _show(rows: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    print(f"{'auto/fastest':>12}  {'auto':<17} {'fastest':<17} {'fastest takes':>13}  shape")
    for row in sorted(rows, key=ratio, reverse=True)[:SHOWN]:
        best = min(row["seconds"], key=row["seconds"].get)
        taken = 1e6 * row["seconds"][best]
        print(
            f"{ratio(row):12.2f}  {row['chosen']:<17} {best:<17} {taken:10.1f} us  {row['title']}"
        )
    print(
        f"\n{summary['points']} points ({summary['left_out']} left out for their size): worst "
        f"{summary['worst']:.2f} (bar {WORST_RATIO}), geometric mean "
        f"{summary['geometric_mean']:.3f} (bar {MEAN_RATIO}), {summary['beyond']} beyond the bar"
    )
    fastest = ", ".join(f"{name} {count}" for name, count in summary["fastest"].items())
    print(f"fastest: {fastest}")
    print(
        f"a cached answer takes {summary['cached_us_median']:.2f} us in the median, "
        f"{summary['cached_us_worst']:.2f} us at worst (bar 5)"
    )


def main(argv: list[str] | None = None) -> int:
    options = _arguments(argv)
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    core = SelectorCore(options.threads)
    if options.learn:
        _learn(core, options)
    points, left_out = _points(options)
    rows: list[dict[str, Any]] = []
    begin = time.monotonic()
    for i, point in enumerate(points):
        if options.minutes and time.monotonic() - begin > 60 * options.minutes:
            break
        rows.append(measure(core, point, options.seconds, options.rounds))
        print(f"{i + 1}/{len(points)} {point.title()}", file=sys.stderr, flush=True)
    summary = _summary(rows, left_out)
    _show(rows, summary)
    if options.json:
        document = {"machine": core.describe(), "summary": summary, "rows": rows}
        options.json.write_text(json.dumps(document, indent=1))
    return int(summary["worst"] > WORST_RATIO or summary["geometric_mean"] > MEAN_RATIO)


if __name__ == "__main__":
    sys.exit(main())

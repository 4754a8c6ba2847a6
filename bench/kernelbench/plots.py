"""Draws a report's plots: `python plots.py REPORT.json FOLDER`. Needs matplotlib alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "kernelbench"  # the same figures give the same file

from matplotlib import pyplot as plt  # noqa: E402

Points = dict[str, list[tuple[float, float]]]


def _lines(rows: list[dict[str, Any]], field: str) -> Points:
    """Values over the length, by system and implementation."""
    lines: Points = {}
    for row in rows:
        if row["bench"] != "sweep" or row.get(field) is None:
            continue
        value = row[field]
        if field == "workspace_bytes":
            value = (value + row["packed_input_bytes"]) / 2**20
        name = f"{row['system']} {row['implementation'] or ''}".strip()
        lines.setdefault(name, []).append((row["extents"]["q_len"], value))
    return {name: sorted(points) for name, points in lines.items()}


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _over_length(lines: Points, label: str, title: str, path: Path) -> None:
    if not lines:
        return
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, points in lines.items():
        # Nothing at all can't be drawn on a logarithmic axis.
        shown = [(x, y) for x, y in points if y > 0]
        if shown:
            axes.plot(*zip(*shown, strict=True), marker="o", markersize=4, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    lengths = sorted({x for points in lines.values() for x, _ in points})
    axes.set_xticks(lengths, [f"{int(x):,}" for x in lengths])
    axes.set_xlabel("sequence length")
    axes.set_ylabel(label)
    axes.set_title(title)
    axes.grid(True, alpha=0.3)
    axes.legend()
    _save(figure, path)


def _sparse(rows: list[dict[str, Any]], path: Path) -> None:
    points = [
        (row["rms_error"] / row["reference_rms"], max(row["ratios"].values()), row["options"])
        for row in rows
        if row["bench"] == "sparse" and row["ratios"]
    ]
    if not points:
        return
    figure, axes = plt.subplots(figsize=(7, 4.5))
    points.sort(key=lambda point: point[0])
    axes.plot([p[0] for p in points], [p[1] for p in points], marker="o")
    for error, speed, options in points:
        text = ", ".join(f"{name} {value}" for name, value in options.items())
        axes.annotate(text, (error, speed), textcoords="offset points", xytext=(6, 4))
    axes.set_xscale("log")
    axes.set_xlabel("RMS error, relative to the exact result")
    axes.set_ylabel("times as fast as exact attention")
    axes.set_title("Sparse attention on long documents, bfloat16, causal")
    axes.grid(True, alpha=0.3)
    _save(figure, path)


def main() -> None:
    report = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    case = "8 heads of 128, bfloat16, causal"
    rows = report["rows"]
    _over_length(_lines(rows, "median_seconds"), "seconds", f"Time, {case}", folder / "time.svg")
    _over_length(
        _lines(rows, "workspace_bytes"),
        "MiB, packed copies of inputs included",
        f"Scratch memory, {case}",
        folder / "memory.svg",
    )
    _sparse(rows, folder / "sparse.svg")


if __name__ == "__main__":
    main()

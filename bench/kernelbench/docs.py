"""The generated part of docs/benchmarks.md, from a report."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from .report import bar_text, pair_time_spread
from .workers import ROOT

BEGIN = "<!-- results: written by scripts/bench kernels --docs -->"
END = "<!-- end of results -->"
PAGE = ROOT / "docs/benchmarks.md"
PLOTS = ROOT / "docs/benchmarks"
PLOT_NAMES = ("time.svg", "memory.svg", "sparse.svg")


def _machine(report: dict[str, Any]) -> str:
    machine, limits = report["machine"], report["limits"]
    peers = ", ".join(f"{name} {version}" for name, version in report["peers"].items()) or "none"
    return (
        f"Machine: {machine['model']}, {machine['isa']}, {machine['threads']} threads, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB of memory. Limits at the start: float32 "
        f"{limits['float32_flops'] / 1e9:.0f} GFLOP/s, bfloat16 "
        f"{limits['bfloat16_flops'] / 1e9:.0f} GFLOP/s, reads "
        f"{limits['read_bytes_per_second'] / 1e9:.0f} GB/s. Peers: {peers}."
    )


def _rate(row: dict[str, Any]) -> str:
    unit = "GB/s" if row["cache_dtype"] else "GFLOP/s"
    return f"{row['rate_per_second'] / 1e9:.3g} {unit}"


def _ratios(row: dict[str, Any]) -> str:
    ordered = sorted(row["ratios"].items(), key=lambda item: item[1])
    return ", ".join(f"{label} {value:.2f}" for label, value in ordered)


def _table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| what | dtype | ours | rate | share of limit | theirs / ours | RMS error | bars |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        order = "" if row["cache_dtype"] else ", causal" if row["causal"] else ", not causal"
        options = "".join(f", {name} {value}" for name, value in row["options"].items())
        bars = "; ".join(bar_text(bar) for bar in row.get("bars", []))
        cells = [
            f"{row['bench']} {row['shape']}{order}{options}",
            row["cache_dtype"] or row["dtype"],
            row["implementation"],
            _rate(row),
            f"{row['share_of_limit']:.2f}",
            _ratios(row),
            f"{row['rms_error']:.1e}",
            bars,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _workspaces(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| scratch memory | ours | bytes | packed copies of inputs, bytes | bars |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        bars = "; ".join(bar_text(bar) for bar in row.get("bars", []))
        lines.append(
            f"| {row['shape']} | {row['implementation']} | {row['workspace_bytes']:,} | "
            f"{row['packed_input_bytes']:,} | {bars} |"
        )
    return lines


def generated(report: dict[str, Any], plots: list[str]) -> str:
    ours = [row for row in report["rows"] if row["beside"] is None]
    blocks = [[_machine(report)]]
    for select, table in (
        (("prefill", "decode", "sparse"), _table),
        (("workspace",), _workspaces),
    ):
        rows = [row for row in ours if row["bench"] in select]
        if rows:
            blocks.append(table(rows))
    spread = pair_time_spread(report["rows"], "flash")
    if spread is not None:
        blocks.append([f"Lengths 512 to 8,192, flash, causal: {bar_text(spread)}."])
    titles = {
        "time.svg": "Time over sequence length",
        "memory.svg": "Scratch memory over sequence length",
        "sparse.svg": "Speed against error of sparse attention",
    }
    blocks += [[f"![{titles[name]}](benchmarks/{name})"] for name in plots]
    return "\n\n".join("\n".join(block) for block in blocks)


def replaced(page: str, text: str) -> str:
    """The page with `text` between the two marks; ValueError where it has none."""
    begin, end = page.find(BEGIN), page.find(END)
    if begin < 0 or end < begin:
        raise ValueError(f"the page has no {BEGIN} before {END}")
    return f"{page[: begin + len(BEGIN)]}\n\n{text}\n\n{page[end:]}"


def draw(report_file: Path, folder: Path) -> list[str]:
    """Draws the plots that the report has figures for; none without matplotlib."""
    python = ROOT / ".venv-bench/bin/python"
    if not python.exists():
        return []
    subprocess.run(
        [str(python), str(Path(__file__).with_name("plots.py")), str(report_file), str(folder)],
        check=False,
    )
    return [name for name in PLOT_NAMES if (folder / name).exists()]


def write(report: dict[str, Any], report_file: Path) -> None:
    plots = draw(report_file, PLOTS)
    PAGE.write_text(replaced(PAGE.read_text(), generated(report, plots)))

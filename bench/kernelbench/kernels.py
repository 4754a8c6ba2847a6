"""`scripts/bench kernels`: our attention implementations against the machine's limits and peers."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from . import docs
from .measure import Measurement
from .report import HEADER, bar_text, bars_of, error_failures, line, pair_time_spread
from .shapes import (
    DTYPES,
    Choice,
    Row,
    Shape,
    custom_row,
    quick_rows,
    sweep_rows,
    table_rows,
    workspace_rows,
)
from .workers import LAUNCHES, WorkerError, started


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench kernels",
        description="Measures our attention implementations beside the machine's limits and other "
        "libraries: correctness first, everything in turn. Prints a table; progress goes to "
        "standard error. Exit code 1 where our RMS error is more than 1.2 times torch's.",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="writes the measurements there")
    parser.add_argument(
        "--quick", action="store_true", help="small shapes, few repeats: shows that it runs"
    )
    parser.add_argument("--peers", action="store_true", help="vLLM's CPU kernels too")
    parser.add_argument(
        "--no-peers", action="store_true", help="ours alone, beside the machine's limits"
    )
    parser.add_argument(
        "--no-install", action="store_true", help="only the peers that are installed already"
    )
    parser.add_argument(
        "--only",
        metavar="PATTERN",
        help="rows whose title, such as 'prefill P1 causal bfloat16', has this in it; * and ? are "
        "wildcards",
    )
    parser.add_argument("--shape", metavar="B,H,HKV,LQ,LKV,D[,DV]", help="a shape of one's own")
    parser.add_argument(
        "--dtype", choices=DTYPES, action="append", help="with --shape; several are allowed"
    )
    parser.add_argument("--causal", action="store_true", help="with --shape")
    parser.add_argument(
        "--implementation", metavar="NAME", help="of ours (default: flash, or the best there is)"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, help="pairs of each (default: 7; --quick: 3)")
    parser.add_argument(
        "--docs",
        action="store_true",
        help="rewrites the results of docs/benchmarks.md and its plots",
    )
    parser.add_argument(
        "--from-json",
        metavar="FILE",
        type=Path,
        help="with --docs: results of an earlier run, nothing is measured",
    )
    parser.add_argument(
        "--list", action="store_true", help="prints the rows' titles and measures nothing"
    )
    arguments = parser.parse_args(argv)
    if arguments.threads < 1 or (arguments.repeats is not None and arguments.repeats < 1):
        parser.error("--threads and --repeats must be at least 1")
    if arguments.shape is not None:
        try:
            arguments.shape = Shape.parse(arguments.shape)
        except ValueError as error:
            parser.error(str(error))
    if arguments.from_json is not None and not arguments.docs:
        parser.error("--from-json goes with --docs")
    if arguments.shape is None and (arguments.causal or arguments.dtype):
        parser.error("--causal and --dtype go with --shape")
    return arguments


def _matches(title: str, pattern: str | None) -> bool:
    return pattern is None or fnmatch(title.lower(), f"*{pattern.lower()}*")


def _rows(arguments: argparse.Namespace, choice: Choice) -> list[Row]:
    if arguments.shape is not None:
        return [
            custom_row(choice, arguments.shape, arguments.causal, dtype)
            for dtype in arguments.dtype or ["float32"]
        ]
    rows = table_rows(choice) + sweep_rows(choice) + workspace_rows(choice)
    if arguments.quick:
        rows = quick_rows(rows)
    return [row for row in rows if _matches(row.title, arguments.only)]


def _choice(arguments: argparse.Namespace, described: dict[str, Any], peers: list[str]) -> Choice:
    known = {row["name"]: row["memory"] for row in described["implementations"]}
    name = arguments.implementation or ("flash" if "flash" in known else next(iter(known)))
    if name not in known:
        raise SystemExit(f"there is no implementation {name}; there are {', '.join(known)}")
    return Choice(name, tuple(peers), known)


def _peer_names(arguments: argparse.Namespace) -> list[str]:
    if arguments.no_peers:
        return []
    return [name for name in LAUNCHES if name != "attnd" and (name != "vllm" or arguments.peers)]


def _measure(
    arguments: argparse.Namespace, report: dict[str, Any], measurement: Measurement, rows: list[Row]
) -> None:
    has_bf16 = report["machine"]["has_bfloat16_dot_product"]
    print(HEADER, flush=True)
    for number, row in enumerate(rows):
        _say(f"[{number + 1}/{len(rows)}] {row.title}")
        try:
            measured = measurement.row(row)
        except WorkerError as error:
            _say(f"  {row.title} failed: {error}")
            report["failures"].append(f"{row.title}: {error}")
            continue
        if not measured:
            print(f"{row.title:26} not available", flush=True)
            continue
        if not arguments.quick:
            measured[0]["bars"] = bars_of(measured[0], has_bf16, report["machine"]["threads"])
        report["rows"] += measured
        for one in measured:
            print(line(one), flush=True)


def _describe(described: dict[str, Any], measurement: Measurement) -> dict[str, Any]:
    """The report's head: the machine and its limits at the start (rows have those beside them)."""
    limits = {
        "float32_flops": measurement.limit("float32"),
        "bfloat16_flops": measurement.limit("bfloat16"),
        "read_bytes_per_second": measurement.limit("read"),
    }
    described = measurement.workers["attnd"].call("describe")
    machine = {k: described[k] for k in ("model", "isa", "features", "threads", "memory_bytes")}
    machine["has_bfloat16_dot_product"] = "bf16" in described["loops"]["bfloat16"]
    versions = {
        name: worker.call("describe")["version"]
        for name, worker in measurement.workers.items()
        if name != "attnd"
    }
    return {
        "machine": machine,
        "limits": {**limits, "loops": described["loops"]},
        "peers": versions,
        "rows": [],
        "failures": [],
    }


def _write(arguments: argparse.Namespace, report: dict[str, Any]) -> None:
    text = json.dumps(report, indent=1) + "\n"
    if arguments.json is not None:
        arguments.json.write_text(text)
    if arguments.docs:
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            file.write(text)
            file.flush()
            docs.write(report, Path(file.name))


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    if arguments.from_json is not None:
        docs.write(json.loads(arguments.from_json.read_text()), arguments.from_json)
        return 0
    repeats = arguments.repeats or (3 if arguments.quick else 7)
    begin = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    names = _peer_names(arguments)
    with started(["attnd", *names], arguments.threads, _say) as workers:
        if "attnd" not in workers:
            return 2
        described = workers["attnd"].call("describe")
        choice = _choice(arguments, described, [name for name in names if name in workers])
        rows = _rows(arguments, choice)
        if arguments.list:
            print("\n".join(row.title for row in rows))
            return 0
        measurement = Measurement(workers, repeats, arguments.quick, _say)
        report = _describe(described, measurement)
        limits = report["limits"]
        print(
            f"{report['machine']['model']}, {report['machine']['isa']}, {arguments.threads} "
            f"threads: float32 {limits['float32_flops'] / 1e9:.0f} GFLOP/s, bfloat16 "
            f"{limits['bfloat16_flops'] / 1e9:.0f}, reads "
            f"{limits['read_bytes_per_second'] / 1e9:.1f} GB/s ({limits['loops']['read']})"
        )
        try:
            _measure(arguments, report, measurement, rows)
        except KeyboardInterrupt:
            _say("interrupted: what was measured is reported")
            report["interrupted"] = True
    for name in {row["implementation"] for row in report["rows"] if row["bench"] == "sweep"}:
        spread = pair_time_spread(report["rows"], name) if name and not arguments.quick else None
        if spread is not None:
            report.setdefault("pair_time", {})[name] = spread
            print(f"{name}: {bar_text(spread)}")
    failures = error_failures(report["rows"]) + report["failures"]
    report["failures"] = failures
    report["seconds"] = time.monotonic() - begin
    _write(arguments, report)
    for failure in failures:
        _say(f"FAILED: {failure}")
    if report.get("interrupted"):
        return 130
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

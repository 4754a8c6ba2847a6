"""The table, and the bars that stand beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# (bench, shape, causal, cache dtype or dtype)
Key = tuple[str, str, bool, str]
JsonRow = dict[str, Any]

# Our RMS error may be this many times torch's on the same data.
ERROR_FACTOR = 1.2
# Where torch is not there to compare with, and with an int8 cache: a share of the result's RMS.
WRONG_SHARE = 0.05
INT8_ERROR = 1e-2
WORKSPACE_MEBIBYTES = 2.0
PAIR_TIME_LENGTH = 8192
PAIR_TIME_SPREAD = 0.15


@dataclass(frozen=True)
class Bar:
    """What a row has to reach: with AVX-512 and bf16, and with AVX2 alone."""

    key: Key
    what: str
    value: Callable[[JsonRow], float | None]
    avx512: float
    avx2: float


def _share(row: JsonRow) -> float | None:
    return row["share_of_limit"]


def _best(row: JsonRow) -> float | None:
    return row["ratio_to_best_peer"]


def _against(text: str) -> Callable[[JsonRow], float | None]:
    """The ratio to the contender whose label begins with `text`."""

    def value(row: JsonRow) -> float | None:
        found = [r for label, r in row["ratios"].items() if label.startswith(text)]
        return found[0] if found else None

    return value


def _attnd_float32(row: JsonRow) -> float | None:
    found = [r for label, r in row["ratios"].items() if label.endswith(" float32")]
    return found[0] if found else None


P1C, P1N, P2C, P3N = (
    ("prefill", "P1", True),
    ("prefill", "P1", False),
    ("prefill", "P2", True),
    ("prefill", "P3", False),
)


def _bars() -> list[Bar]:
    bars = []
    for dtype, case, share, best in (
        ("bfloat16", P1C, (0.80, 0.72), (2.1, 1.15)),
        ("bfloat16", P1N, (0.84, 0.75), (1.1, 1.0)),
        ("bfloat16", P2C, (0.77, 0.62), (2.1, 1.0)),
        ("float32", P1C, (0.83, 0.78), (1.0, 1.25)),
        ("float32", P1N, (0.85, 0.80), (1.0, 1.03)),
        ("float32", P2C, (0.78, 0.66), (1.0, 1.03)),
    ):
        bars.append(Bar((*case, dtype), "share of limit", _share, *share))
        bars.append(Bar((*case, dtype), "best peer / ours", _best, *best))
    for case in (P1C, P2C):
        key = (*case, "float16")
        bars.append(Bar(key, "our float32 / ours", _attnd_float32, 0.97, 0.95))
        bars.append(Bar(key, "torch / ours", _against("torch"), 1.8, 1.0))
    bars.append(Bar((*P3N, "bfloat16"), "best peer / ours", _best, 1.35, 1.15))
    bars.append(Bar((*P3N, "float32"), "best peer / ours", _best, 1.2, 1.15))
    for name in ("D1", "D2", "D3"):
        for dtype in ("float32", "bfloat16"):
            key = ("decode", name, False, dtype)
            bars.append(Bar(key, "share of limit", _share, 0.72, 0.65))
            if name != "D1":
                best = (1.25, 1.35) if dtype == "float32" else (1.85, 1.9)
                bars.append(Bar(key, "best peer / ours", _best, *best))
    int8 = ("decode", "D2", False, "int8")
    bars.append(Bar(int8, "our bfloat16 / ours", _against("attnd"), 1.6, 1.2))
    sparse = ("sparse", "S", True, "bfloat16")
    bars.append(Bar(sparse, "our exact / ours", _against("attnd"), 6.0, 6.0))
    bars.append(Bar(sparse, "mass of an oracle's", lambda row: row.get("of_oracle"), 0.97, 0.97))
    return bars


BARS = _bars()


def key_of(row: JsonRow) -> Key:
    return (row["bench"], row["shape"], row["causal"], row["cache_dtype"] or row["dtype"])


def bars_of(row: JsonRow, has_bf16: bool, threads: int) -> list[dict[str, Any]]:
    """[{"what", "value", "bar", "at_most", "met"}] of one of our rows, on this kind of machine."""
    result = []
    for bar in BARS:
        value = bar.value(row) if bar.key == key_of(row) else None
        if value is not None:
            least = bar.avx512 if has_bf16 else bar.avx2
            result.append(_judged(bar.what, value, least, at_most=False))
    if row["cache_dtype"] == "int8":
        relative = row["rms_error"] / row["reference_rms"]
        result.append(_judged("relative error", relative, INT8_ERROR, at_most=True))
    if row["bench"] == "workspace":
        mebibytes = row["workspace_bytes"] / threads / 2**20
        result.append(_judged("MiB per thread", mebibytes, WORKSPACE_MEBIBYTES, at_most=True))
        shape = row["extents"]
        tokens = shape["batch"] * shape["num_kv_heads"] * shape["kv_len"]
        inputs = 4 * tokens * (shape["head_dim"] + shape["value_dim"])
        packed = row["packed_input_bytes"] / inputs
        result.append(_judged("packed / float32 K and V", packed, 1.0, at_most=True))
    return result


def _judged(what: str, value: float, bar: float, at_most: bool) -> dict[str, Any]:
    met = value <= bar if at_most else value >= bar
    return {"what": what, "value": value, "bar": bar, "at_most": at_most, "met": met}


def pair_time_spread(rows: list[JsonRow], implementation: str) -> dict[str, Any] | None:
    """How far the time per visible pair differs between lengths, as a share of the shortest.

    In units of the limit measured beside, so that the machine's drift is not counted.
    """
    shares = {
        row["extents"]["q_len"]: row["share_of_limit"]
        for row in rows
        if row["bench"] == "sweep" and row["implementation"] == implementation
        if row["extents"]["q_len"] <= PAIR_TIME_LENGTH
    }
    if len(shares) < 2:
        return None
    spread = max(shares.values()) / min(shares.values()) - 1
    judged = _judged("spread of time per visible pair", spread, PAIR_TIME_SPREAD, at_most=True)
    return {"shares": shares, **judged}


def error_failures(rows: list[JsonRow]) -> list[str]:
    """Our rows whose error is more than ERROR_FACTOR times torch's on the same data."""
    torch = {key_of(r): r["rms_error"] for r in rows if r["system"] == "torch"}
    failures = []
    for row in rows:
        if row["system"] != "attnd" or row["options"]:
            continue
        limit = ERROR_FACTOR * torch.get(key_of(row), math.inf)
        limit = min(limit, WRONG_SHARE * row["reference_rms"])
        if not row["rms_error"] <= limit:
            failures.append(
                f"{row['bench']} {row['shape']} {row['cache_dtype'] or row['dtype']} "
                f"{row['implementation']}: RMS error {row['rms_error']:.2e}, allowed {limit:.2e}"
            )
    return failures


HEADER = (
    f"{'':32} {'system':22} {'seconds':>10} {'p95':>10} {'share':>6} {'to best':>8} "
    f"{'best peer':11} {'max error':>9} {'rms':>8}  bars"
)


def _number(value: float | None, form: str, width: int) -> str:
    return " " * width if value is None else format(value, form).rjust(width)


def line(row: JsonRow) -> str:
    """One line of the table; those that stand beside our row come under it."""
    order = " causal" if row["causal"] else ""
    dtype = row["cache_dtype"] or row["dtype"]
    name = f"{row['bench']} {row['shape']} {dtype}{order}" if row["beside"] is None else ""
    system = f"{row['system']} {row['implementation'] or ''}"
    if row["beside"] is not None and row["system"] == "attnd":
        system += f" {dtype}"
    text = (
        f"{name:32} {system:22} {row['median_seconds']:10.6f} {row['p95_seconds']:10.6f} "
        f"{row['share_of_limit']:6.2f} {_number(row['ratio_to_best_peer'], '.2f', 8)} "
        f"{row['best_peer'] or '':11} {row['max_abs_error']:9.1e} {row['rms_error']:8.1e}  "
    )
    return (text + "; ".join(map(bar_text, row.get("bars", [])))).rstrip()


def bar_text(bar: dict[str, Any]) -> str:
    """As it stands in the table: what, value, whether it is met, and the bar."""
    sign = "<=" if bar["at_most"] else ">="
    met = "met" if bar["met"] else "NOT MET"
    return f"{bar['what']} {bar['value']:.3g} ({met}: {sign} {bar['bar']:g})"

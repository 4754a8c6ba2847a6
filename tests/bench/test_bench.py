"""The command itself, on a toy shape: what it prints and the JSON that it writes."""

import json
import math
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHAPE = "1,4,2,16,100,32"
SMOKE = ["kernels", "--quick", "--no-install", "--shape", SHAPE]


@pytest.fixture(scope="module", autouse=True)
def library():
    path = ROOT / "build/release/lib/libattn_bench.so"
    if not path.is_file():
        pytest.fail(f"there is no {path}: scripts/build makes it", pytrace=False)
    return path


def bench(*arguments):
    return subprocess.run(
        [str(ROOT / "scripts/bench"), *arguments],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
        env={**os.environ, "ATTN_BENCH_LIBRARY": str(ROOT / "build/release/lib/libattn_bench.so")},
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    file = tmp_path_factory.mktemp("bench") / "report.json"
    done = bench(
        *SMOKE, "--causal", "--dtype", "float32", "--dtype", "bfloat16", "--json", str(file)
    )
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


def test_machine_and_limits(report):
    assert {"model", "isa", "threads", "memory_bytes"} <= report["machine"].keys()
    limits = report["limits"]
    assert limits["float32_flops"] > 1e8
    assert limits["bfloat16_flops"] > 1e8
    assert limits["read_bytes_per_second"] > 1e8
    assert report["failures"] == []


def test_rows(report):
    rows = report["rows"]
    assert {row["system"] for row in rows} >= {"attnd", "torch"}
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    for row in rows:
        assert row["bench"] == "prefill"
        assert row["shape"] == SHAPE
        assert row["causal"] is True
        for name in (
            "median_seconds",
            "p95_seconds",
            "share_of_limit",
            "rms_error",
            "max_abs_error",
        ):
            assert math.isfinite(row[name])
            assert row[name] > 0
        assert row["p95_seconds"] >= row["median_seconds"]
        assert row["reference_rows"] == row["all_rows"] == 64
        assert row["rms_error"] < (1e-5 if row["dtype"] == "float32" else 1e-2)


def test_our_rows_name_the_best_peer(report):
    ours = [row for row in report["rows"] if row["beside"] is None]
    assert len(ours) == 2
    for row in ours:
        assert row["system"] == "attnd"
        assert row["implementation"]
        assert row["ratio_to_best_peer"] == row["ratios"][row["best_peer"]] > 0
        assert row["workspace_bytes"] >= 0
        assert row["packed_input_bytes"] >= 0
        assert 0 <= row["foreign_cpu_share"] <= 1


def test_one_query_is_decoding(tmp_path):
    file = tmp_path / "report.json"
    shape = ["--shape", "2,4,2,1,100,32,48", "--dtype", "float16"]
    done = bench("kernels", "--quick", "--no-peers", *shape, "--json", str(file))
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(file.read_text())["rows"]
    assert (row["bench"], row["cache_dtype"], row["best_peer"]) == ("decode", "float16", None)
    assert row["rms_error"] < 1e-3


@pytest.mark.parametrize(
    "arguments",
    [
        ["kernels", "--shape", "1,4,3,16,100,32"],
        ["kernels", "--causal"],
        ["kernels", "--no-peers", "--shape", SHAPE, "--implementation", "nothing"],
        ["kernels", "--unknown"],
        ["other"],
    ],
)
def test_refuses(arguments):
    done = bench(*arguments, *(["--no-install"] if arguments[0] == "kernels" else []))
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr != ""


def test_loops_for_one_instruction_set_leave_nothing_behind():
    objects = list((ROOT / "build/release/bench").rglob("limits_avx*.o"))
    assert objects
    for path in objects:
        symbols = subprocess.run(["nm", str(path)], capture_output=True, text=True, check=True)
        kinds = {line.split()[-2] for line in symbols.stdout.splitlines()}
        assert not kinds & set("WwVvu"), path.name

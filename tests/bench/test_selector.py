"""`scripts/bench selector`: its grid, its bars, and that it runs on a few points."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from selectorbench import grid
from selectorbench.measure import ratio

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--seconds", "0.02", "--rounds", "3", "--learn", "2"]
LIBRARY = ROOT / "build/release/lib/libattn_bench.so"


def test_the_grid_spans_what_the_bar_is_about():
    points = grid.grid(quick=False)
    assert len(set(points)) == len(points)
    assert {point.q_len for point in points} >= {1, 4096}
    assert {point.kv_len for point in points} >= {1, 32768}
    assert {point.batch for point in points} >= {1, 32}
    assert {point.cache_dtype for point in points} == {"", "float32", "float16", "bfloat16", "int8"}
    kept = [point for point in points if grid.fits(point, 1 << 40)]
    assert 0 < len(kept) < len(points)
    assert max(point.operations for point in kept) <= 2e11
    assert max(point.tensor_bytes for point in kept) <= 1 << 30
    assert not any(grid.fits(point, 1) for point in points)


def test_random_points_are_seeded_and_fit():
    points = grid.random_points(50, seed=3)
    assert points == grid.random_points(50, seed=3)
    assert points != grid.random_points(50, seed=4)
    assert all(grid.fits(point, 1 << 30) for point in points)


def row(chosen, **seconds):
    return {"chosen": chosen, "seconds": seconds}


def test_small_points_have_ten_microseconds():
    assert ratio(row("a", a=2.0, b=1.0)) == 2.0
    assert ratio(row("b", a=2.0, b=1.0)) == 1.0
    assert ratio(row("a", a=14e-6, b=5e-6)) == 1.0
    assert ratio(row("a", a=25e-6, b=5e-6)) == pytest.approx(3.0)


def test_it_runs(tmp_path):
    if not LIBRARY.is_file():
        pytest.fail(f"there is no {LIBRARY}: scripts/build makes it", pytrace=False)
    file = tmp_path / "report.json"
    done = subprocess.run(
        [ROOT / "scripts/bench", "selector", "--quick", "--sample", "6", *QUICK, "--json", file],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
        env={**os.environ, "ATTN_BENCH_LIBRARY": str(LIBRARY)},
    )
    assert done.returncode in (0, 1), done.stderr  # 1: beyond a bar, on a machine that is busy
    report = json.loads(file.read_text())
    assert report["summary"]["points"] == 6
    assert "geometric mean" in done.stdout
    for measured in report["rows"]:
        assert measured["chosen"] in measured["seconds"]
        assert "estimated" in measured["reason"]
        assert "sparse" not in measured["seconds"]

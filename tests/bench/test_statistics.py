"""From samples to shares, ratios, bars and failures."""

import pytest
from kernelbench.report import bars_of, error_failures, line, pair_time_spread
from kernelbench.statistics import Samples, best_peer, percentile, ratio


def row(**changes):
    fields = {
        "bench": "prefill",
        "shape": "P1",
        "extents": {"batch": 1, "num_kv_heads": 8, "q_len": 2048, "kv_len": 2048, "head_dim": 128,
                    "value_dim": 128},
        "dtype": "bfloat16",
        "cache_dtype": None,
        "causal": True,
        "system": "attnd",
        "implementation": "flash",
        "options": {},
        "beside": None,
        "median_seconds": 0.1,
        "p95_seconds": 0.2,
        "share_of_limit": 0.75,
        "ratio_to_best_peer": 1.2,
        "best_peer": "torch",
        "ratios": {"torch": 1.2},
        "max_abs_error": 1e-3,
        "rms_error": 1e-4,
        "reference_rms": 0.1,
        "workspace_bytes": 0,
        "packed_input_bytes": 0,
    }  # fmt: skip
    return fields | changes


def test_percentile_interpolates():
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([1.0, 2.0], 0.95) == pytest.approx(1.95)
    assert percentile([4.0], 0.95) == 4.0


def test_share_is_the_median_of_pairs_not_the_ratio_of_medians():
    samples = Samples()
    for seconds, limit in ((1.0, 100.0), (2.0, 50.0), (4.0, 25.0)):
        samples.add(seconds, limit)
    assert samples.share(80.0) == pytest.approx(0.8)  # every pair says so
    samples.add(1.0, 400.0)
    samples.add(1.0, 800.0)
    assert samples.share(80.0) == pytest.approx(0.8)
    assert samples.summary(80.0)["samples"] == 5


def test_ratio_above_one_means_that_ours_is_faster():
    assert ratio([(1.0, 2.0), (1.0, 3.0), (2.0, 2.0)]) == 2.0


def test_best_peer_has_the_lowest_median():
    assert best_peer({"a": [3.0, 1.0, 3.0], "b": [2.0, 2.0, 9.0]}) == "b"
    assert best_peer({"a": []}) is None
    assert best_peer({}) is None


def test_bars_depend_on_the_kind_of_machine():
    met = {bar["what"]: bar["met"] for bar in bars_of(row(), has_bf16=False, threads=2)}
    assert met == {"share of limit": True, "best peer / ours": True}
    met = {bar["what"]: bar["met"] for bar in bars_of(row(), has_bf16=True, threads=2)}
    assert met == {"share of limit": False, "best peer / ours": False}


def test_bars_of_other_rows_do_not_apply():
    assert bars_of(row(shape="1,1,1,8,8,16"), has_bf16=False, threads=2) == []
    assert bars_of(row(dtype="float32", causal=False), False, 2)[0]["bar"] == 0.80
    without_peers = row(ratio_to_best_peer=None)
    assert [bar["what"] for bar in bars_of(without_peers, False, 2)] == ["share of limit"]


def test_workspace_and_int8_have_bars_that_are_upper_bounds():
    memory = row(bench="workspace", shape="prefill n=32768", workspace_bytes=5 << 20)
    bars = bars_of(memory, has_bf16=False, threads=2)
    assert [(bar["value"], bar["met"]) for bar in bars] == [(2.5, False), (0.0, True)]
    int8 = row(bench="decode", shape="D2", causal=False, cache_dtype="int8", rms_error=2e-3)
    bars = bars_of(int8, has_bf16=False, threads=2)
    assert bars[-1]["what"] == "relative error"
    assert not bars[-1]["met"]


def test_an_error_above_torchs_fails():
    torch = row(system="torch", implementation=None, rms_error=1e-4)
    assert error_failures([row(rms_error=1.19e-4), torch]) == []
    assert len(error_failures([row(rms_error=1.21e-4), torch])) == 1
    assert len(error_failures([row(rms_error=float("inf")), torch])) == 1
    assert len(error_failures([row(rms_error=float("nan"))])) == 1
    assert len(error_failures([row(rms_error=0.06)])) == 1  # far off, even without torch
    other_data = row(system="torch", dtype="float32", rms_error=1e-9)
    assert error_failures([row(), other_data]) == []


def test_spread_is_taken_in_units_of_the_limit():
    rows = [
        row(bench="sweep", extents={"q_len": n}, share_of_limit=share)
        for n, share in ((512, 0.70), (1024, 0.77), (16384, 0.1))
    ]
    spread = pair_time_spread(rows, "flash")
    assert spread["value"] == pytest.approx(0.1)
    assert spread["met"]
    assert pair_time_spread(rows[:1], "flash") is None
    assert pair_time_spread(rows, "standard") is None


def test_a_line_has_the_bars():
    ours = row()
    ours["bars"] = bars_of(ours, has_bf16=False, threads=2)
    assert "share of limit 0.75 (met: >= 0.72)" in line(ours)
    assert "P1" not in line(row(beside="prefill P1", system="torch", ratios={}))

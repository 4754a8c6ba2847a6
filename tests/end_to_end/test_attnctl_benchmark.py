"""attnctl benchmark: progress, a table, JSON, a picture, Ctrl-C."""

import json
import signal
import subprocess
import xml.etree.ElementTree as ET

import pytest

from attnd import api
from end_to_end.test_attnctl import ATTNCTL, attnctl

MODEL = "drawn"
QUICK = ("--q-len", 32, "--iterations", 2)


@pytest.fixture(autouse=True)
def model(client):
    layer = api.LayerSpec(num_heads=4, num_kv_heads=2, head_dim=32, value_dim=32)
    spec = api.ModelSpec(stacks=[api.LayerStack(self_attention=[layer])])
    client.load_model(MODEL, spec=spec)
    yield
    client.unload_model(MODEL)


def test_it_shows_progress_then_a_table(server):
    result = attnctl("benchmark", MODEL, *QUICK, address=server.address)
    assert result.returncode == 0, result.stderr
    assert "benchmark: 100 %" in result.stderr
    title, header, *rows = result.stdout.splitlines()
    assert title.startswith(f"{MODEL}, layer 0, batch 1, q_len 32")
    assert header.split()[:3] == ["IMPLEMENTATION", "BACKEND", "MEDIAN"]
    assert {row.split()[0] for row in rows} >= {"flash", "standard", "torch_sdpa"}


def test_json(server):
    result = attnctl("--json", "benchmark", MODEL, *QUICK, "--cached", address=server.address)
    assert result.returncode == 0, result.stderr
    results = {entry["implementation"]: entry for entry in json.loads(result.stdout)}
    assert results["flash"]["median_seconds"] > 0
    assert results["flash"]["iterations"] == 2
    assert results["flash"]["max_abs_error"] < 2e-5


def test_a_picture(server, tmp_path):
    path = tmp_path / "bars.svg"
    names = "flash,standard"
    options = ("--implementations", names, "--output-attentions", "--plot", path)
    result = attnctl("benchmark", MODEL, *QUICK, *options, address=server.address)
    assert result.returncode == 0, result.stderr
    root = ET.parse(path).getroot()
    space = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{space}svg"
    bars = [bar for bar in root.iter(f"{space}rect") if bar.get("class") == "bar"]
    assert len(bars) == 1  # flash can't return the weights, and says so
    assert float(bars[0].get("width")) > 0
    texts = {text.text for text in root.iter(f"{space}text")}
    assert {"flash", "standard"} <= texts


def test_what_fails(server, tmp_path):
    for options in (
        (MODEL, "--layer", 3),
        ("no_such",),
        (MODEL, "--q-len", 0),
        (MODEL, "--implementations", "no_such"),
        (MODEL, *QUICK, "--plot", tmp_path / "none" / "bars.svg"),
    ):
        result = attnctl("benchmark", *options, address=server.address)
        assert result.returncode == 1, options
        assert result.stdout == ""
        assert result.stderr.splitlines()[-1].startswith("attnctl: ")


def test_ctrl_c_cancels(server, client):
    command = [ATTNCTL, "--address", server.address, "benchmark", MODEL]
    command += ["--iterations", "100000", "--seconds", "600"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert "benchmark:" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        process.wait(30.0)
    finally:
        process.kill()
        process.stderr.close()
    assert process.returncode == 130

"""attnctl as its users run it: on files, in tables and JSON, and failing."""

import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
ATTND = ROOT / os.environ.get("ATTND_BINARY", "build/release/bin/attnd")
ATTNCTL = ATTND.with_name("attnctl")


def attnctl(*arguments, address):
    command = [ATTNCTL, "--address", address, *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture
def run(server):
    """Runs attnctl against the server; what it printed, once it has succeeded."""

    def run(*arguments):
        result = attnctl(*arguments, address=server.address)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


@pytest.fixture
def fail(server):
    """The same where attnctl must fail: its one line of error."""

    def fail(*arguments):
        result = attnctl(*arguments, address=server.address)
        assert result.returncode == 1, result
        assert result.stdout == ""
        assert result.stderr.startswith("attnctl: ")
        assert result.stderr.count("\n") == 1
        return result.stderr

    return fail


def random_problem(num_kv_heads=2, value_dim=16):
    random = np.random.default_rng(7)
    query = random.standard_normal((2, 4, 5, 16), dtype=np.float32)
    key = random.standard_normal((2, num_kv_heads, 9, 16), dtype=np.float32)
    value = random.standard_normal((2, num_kv_heads, 9, value_dim), dtype=np.float32)
    return query, key, value


def save(folder, **arrays):
    """The options that name the saved files."""
    options = []
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
        options += [f"--{name}", folder / f"{name}.npy"]
    return options


def attention(query, key, value, hidden=None, scale=None):
    """Output, weights and LSE in double precision; hidden is true where a query sees no key."""
    query, key, value = (array.astype(np.float64) for array in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    key, value = np.repeat(key, groups, axis=1), np.repeat(value, groups, axis=1)
    scores = query @ key.swapaxes(-1, -2) * (scale or query.shape[-1] ** -0.5)
    if hidden is not None:
        scores = np.where(hidden, -np.inf, scores)
    lse = np.log(np.exp(scores).sum(axis=-1))
    weights = np.exp(scores - lse[..., None])
    return weights @ value, weights, lse


def after_the_query(q_len, kv_len):
    return np.arange(kv_len) > np.arange(q_len)[:, None] + kv_len - q_len


def test_attend_writes_output_weights_and_lse(run, tmp_path):
    query, key, value = random_problem(value_dim=24)
    files = {name: tmp_path / f"{name}.npy" for name in ("output", "weights", "lse")}
    writes = [item for name, path in files.items() for item in (f"--{name}", path)]
    text = run("attend", *save(tmp_path, query=query, key=key, value=value), "--causal", *writes)
    expected = attention(query, key, value, after_the_query(5, 9))
    for path, array in zip(files.values(), expected, strict=True):
        written = np.load(path)
        assert written.dtype == np.float32
        np.testing.assert_allclose(written, array, atol=2e-5)
    assert "[2, 4, 5, 24]" in text
    assert "implementation" in text


def test_attend_takes_masks_windows_and_scale(run, tmp_path):
    query, key, value = random_problem()
    mask = np.random.default_rng(8).random((2, 1, 5, 9)) < 0.7
    mask[..., 4:7] = True  # within every window: no row is empty
    files = save(tmp_path, query=query, key=key, value=value, mask=mask)
    output = tmp_path / "o.npy"
    run(
        "attend",
        *files,
        "--window-left",
        3,
        "--window-right",
        -1,
        "--scale",
        0.5,
        "--output",
        output,
    )
    before = np.arange(9) < np.arange(5)[:, None] + 4 - 3
    expected, _, _ = attention(query, key, value, before | ~mask, scale=0.5)
    np.testing.assert_allclose(np.load(output), expected, atol=2e-5)


def test_attend_converts_to_bfloat16_and_lays_tokens_first(run, tmp_path):
    query, key, value = random_problem()
    tokens_first = {
        name: array.swapaxes(1, 2).copy()
        for name, array in (("query", query), ("key", key), ("value", value))
    }
    options = ["--layout", "tokens_first", "--dtype", "bfloat16", "--implementation", "standard"]
    output = tmp_path / "o.npy"
    text = run("attend", *save(tmp_path, **tokens_first), *options, "--output", output)
    written = np.load(output).view(ml_dtypes.bfloat16).astype(np.float32)
    rounded = (array.astype(ml_dtypes.bfloat16) for array in (query, key, value))
    expected, _, _ = attention(*rounded)
    np.testing.assert_allclose(written.swapaxes(1, 2), expected, atol=2e-2)
    assert "bfloat16" in text


def test_attend_reads_what_numpy_and_ml_dtypes_save(run, tmp_path):
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float64):
        query, key, value = (array.astype(dtype) for array in random_problem())
        output = tmp_path / "o.npy"
        files = save(tmp_path, query=query, key=key, value=value)
        run("attend", *files, "--output-dtype", "float32", "--output", output)
        np.testing.assert_allclose(np.load(output), attention(query, key, value)[0], atol=2e-2)


def test_attend_json_names_files_instead_of_dumping_them(run, tmp_path):
    query, key, value = random_problem()
    output = tmp_path / 'a "quoted" name.npy'
    files = save(tmp_path, query=query, key=key, value=value)
    answer = json.loads(
        run("attend", *files, "--output", output, "--lse", tmp_path / "l.npy", "--json")
    )
    assert answer["output"] == {
        "dtype": "DATA_TYPE_FLOAT32",
        "shape": [2, 4, 5, 16],
        "file": str(output),
    }
    assert answer["lse"]["shape"] == [2, 4, 5]
    assert answer["execution"]["implementation"]


@pytest.mark.parametrize("command", ["models", "implementations", "hardware", "info"])
def test_listings_are_tables_or_json(run, command):
    assert len(run(command).splitlines()) >= 1
    assert isinstance(json.loads(run(command, "--json")), dict)


def test_implementations_are_listed_by_name(run):
    names = [row["name"] for row in json.loads(run("implementations", "--json"))["implementations"]]
    assert {"standard", "torch_sdpa"} <= set(names)
    table = run("implementations").splitlines()
    assert table[0].startswith("IMPLEMENTATION")
    assert [line.split()[0] for line in table[1:]] == names


def test_switching_attention_without_a_model(run, fail):
    try:
        assert "-> standard" in run("switch", "-", "standard")
        answer = json.loads(run("switch", "", "standard", "--json"))
        assert answer["switched"] is True
        assert answer["active"] == "standard"
        assert "NOT_FOUND" in fail("switch", "-", "no_such_implementation")
    finally:
        run("switch", "-", "auto")


SPEC = """
stacks {
  hidden_size: 64
  self_attention { repeat: 3 num_heads: 4 num_kv_heads: 2 head_dim: 16 value_dim: 16 }
}
dtype: DATA_TYPE_FLOAT32
"""


def test_a_model_is_loaded_listed_used_switched_and_unloaded(run, fail, tmp_path):
    (tmp_path / "spec.txt").write_text(SPEC)
    load = ("model", "load", "attnctl_test", "--spec", tmp_path / "spec.txt")
    assert "attnctl_test" in run(*load, "--implementation", "standard")
    try:
        assert "MODEL_EXISTS" in fail(*load)
        models = json.loads(run("models", "--json"))["models"]
        (model,) = (model for model in models if model["spec"]["name"] == "attnctl_test")
        assert model["active_implementation"] == "standard"
        assert "attnctl_test: standard -> torch_sdpa" in run("switch", "attnctl_test", "torch_sdpa")
        query, key, value = random_problem()
        files = save(tmp_path, query=query, key=key, value=value)
        run(
            "attend",
            *files,
            "--model",
            "attnctl_test",
            "--layer",
            2,
            "--output",
            tmp_path / "o.npy",
        )
        expected, _, _ = attention(query, key, value)
        np.testing.assert_allclose(np.load(tmp_path / "o.npy"), expected, atol=2e-5)
    finally:
        run("model", "unload", "attnctl_test")
    assert "MODEL_NOT_FOUND" in fail("model", "unload", "attnctl_test")


def test_errors_say_code_reason_and_field(fail, tmp_path):
    query, key, value = random_problem(num_kv_heads=3)
    error = fail("attend", *save(tmp_path, query=query, key=key, value=value))
    assert error.startswith("attnctl: INVALID_ARGUMENT: ")
    assert "(INVALID_FIELD; " in error
    assert "field=" in error


def test_files_that_cannot_be_sent_are_refused_before_the_call(tmp_path):
    query, key, value = random_problem()
    files = save(tmp_path, query=query, key=key, value=value)
    (tmp_path / "query.npy").write_bytes((tmp_path / "query.npy").read_bytes()[:-1])
    result = attnctl("attend", *files, address="127.0.0.1:1")
    assert result.returncode == 1
    assert result.stderr.startswith(f"attnctl: INVALID_ARGUMENT: {tmp_path}/query.npy: ")


def test_a_server_that_is_not_there_is_named_with_what_to_do():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    result = attnctl("models", address=address)
    assert result.returncode == 1
    assert result.stderr.startswith(f"attnctl: UNAVAILABLE: no answer from {address}")
    assert f"attnd --listen {address}" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["no_such_command"],
        ["attend", "--query", "q.npy"],
        ["attend", "--query", "a", "--key", "b", "--value", "c", "--layer", "1"],
        ["attend", "--query", "a", "--key", "b", "--value", "c", "--dtype", "float8"],
        ["model", "load", "name"],
        ["models", "--timeout", "-1"],
        ["models", "surplus"],
    ],
)
def test_usage_errors_end_with_2_and_a_hint(arguments):
    result = attnctl(*arguments, address="127.0.0.1:1")
    assert result.returncode == 2
    assert "--help" in result.stderr
    assert result.stdout == ""


@pytest.fixture
def silent_server():
    """A server that takes connections and never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def test_a_timeout_ends_a_call(silent_server):
    address = f"127.0.0.1:{silent_server.getsockname()[1]}"
    result = attnctl("--timeout", 0.3, "models", address=address)
    assert result.returncode == 1
    assert result.stderr.startswith("attnctl: DEADLINE_EXCEEDED: ")


def test_ctrl_c_cancels_the_call(silent_server):
    address = f"127.0.0.1:{silent_server.getsockname()[1]}"
    command = [ATTNCTL, "--address", address, "models"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        connection, _ = silent_server.accept()  # the call has begun: gRPC connects when it needs to
        with connection:
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=20)
    assert process.returncode == 130
    assert error.startswith("attnctl: CANCELLED: ")

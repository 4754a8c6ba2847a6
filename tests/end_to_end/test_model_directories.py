"""LoadModel of directories: paths, configs and weights that are not what they should be."""

import json
import os
import shutil
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from attnd import api, errors
from end_to_end import hf_models

SPEC = api.ModelSpec(
    stacks=[
        api.LayerStack(
            self_attention=[api.LayerSpec(num_heads=4, num_kv_heads=2, head_dim=16, value_dim=16)]
        )
    ]
)


@pytest.fixture
def broken_directory(bert_directory, model_root):
    directory = model_root / "broken"
    shutil.copytree(bert_directory, directory)
    yield directory
    shutil.rmtree(directory)


def test_a_spec_that_contradicts_its_directory(client, bert_directory):
    spec = api.ModelSpec(stacks=[api.LayerStack(hidden_size=64)])
    with pytest.raises(errors.InvalidArgument):
        client.load_model("contradiction", weights=bert_directory.name, spec=spec)


@pytest.mark.parametrize(
    "weights",
    [
        "../{name}",
        "{name}/../../{root}/{name}",
        "{root_path}/{name}",
        "/etc",
        "..",
        "{name}/../../../../../../etc",
        "nothing",
        "{name}/config.json",
        "x" * 5000,
    ],
)
def test_paths_that_leave_the_model_root_or_lead_nowhere(
    client, bert_directory, model_root, weights
):
    weights = weights.format(name=bert_directory.name, root=model_root.name, root_path=model_root)
    with pytest.raises(errors.InvalidArgument) as raised:
        client.load_model("traversal", weights=weights)
    assert "root:" not in raised.value.message  # nothing of /etc


def test_links_out_of_the_model_root(client, bert_directory, model_root, tmp_path):
    outside = tmp_path / "outside"
    shutil.copytree(bert_directory, outside)
    directory_link = model_root / "link-out"
    file_links = model_root / "files-out"
    file_links.mkdir()
    try:
        directory_link.symlink_to(outside)
        for file in os.listdir(outside):
            (file_links / file).symlink_to(outside / file)
        for link in (directory_link, file_links):
            with pytest.raises(errors.InvalidArgument):
                client.load_model("links", weights=link.name)
    finally:
        directory_link.unlink()
        shutil.rmtree(file_links)


def edit_config(directory, **changes):
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    config = {name: value for name, value in config.items() if value is not ...}
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("field", ["model_type", "hidden_size", "num_attention_heads"])
def test_a_config_without_a_needed_field(client, broken_directory, field):
    edit_config(broken_directory, **{field: ...})
    with pytest.raises(errors.InvalidArgument) as raised:
        client.load_model("broken", weights=broken_directory.name)
    assert field in raised.value.message


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mamba"},
        {"position_embedding_type": "relative_key"},
        {"is_decoder": True},
        {"sliding_window": 128},
        {"quantization_config": {"bits": 4}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_changes_attention_and_is_not_understood_is_refused_by_name(
    client, broken_directory, changes
):
    edit_config(broken_directory, **changes)
    with pytest.raises(errors.Unimplemented) as raised:
        client.load_model("broken", weights=broken_directory.name)
    assert next(iter(changes)) in raised.value.message


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 2},  # weights of one
        {"hidden_size": 256},  # weights of 128
        {"num_attention_heads": 7},
        {"num_attention_heads": -4},
        {"num_attention_heads": 10**30},
        {"hidden_size": "128"},
    ],
    ids=str,
)
def test_a_config_that_does_not_fit(client, broken_directory, changes):
    edit_config(broken_directory, **changes)
    with pytest.raises(errors.InvalidArgument):
        client.load_model("broken", weights=broken_directory.name)


def safetensors(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start, end, shape=(2,)):
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x08\0\0\0\0\0\0",
        safetensors(b"{}", length=2**63),
        safetensors({"a": entry(0, 8)}, b"1234"),
        safetensors({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
        safetensors({"a": entry(8, 0)}, bytes(8)),
        safetensors({"a": entry(0, 8, (2**62, 4))}, bytes(8)),
        safetensors(b'{"a":' + json.dumps(entry(0, 8)).encode() + b',"a":{}}', bytes(8)),
        safetensors(b"[" * 100_000),
        safetensors(b"\xff\xfe"),
    ],
    ids=[
        "empty_file",
        "no_header",
        "length_beyond_the_file",
        "offsets_beyond_the_file",
        "overlap",
        "offsets_backwards",
        "overflowing_shape",
        "duplicate_name",
        "absurd_nesting",
        "not_utf8",
    ],
)
def test_a_weights_file_that_lies(client, broken_directory, content):
    (broken_directory / "model.safetensors").write_bytes(content)
    with pytest.raises(errors.InvalidArgument):
        client.load_model("broken", weights=broken_directory.name)


def test_a_server_without_a_model_root_loads_no_weights(start_server, connect, bert_directory):
    server = start_server(models={"given": bert_directory})
    own = connect(server.address)
    assert [model.spec.name for model in own.list_models()] == ["given"]
    with pytest.raises(errors.FailedPrecondition):
        own.load_model("more", weights=bert_directory.name)
    assert own.load_model("weightless", spec=SPEC).spec.name == "weightless"


def test_serving_goes_on_while_a_model_is_loaded(server, client, model_root, unload):
    unload.append("large")
    directory = model_root / "large"
    sizes = {"hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 16}
    hf_models.make_bert(seed=6, vocab_size=8, intermediate_size=8, **sizes).to(
        torch.bfloat16
    ).save_pretrained(directory)
    query = np.ones((1, 1, 1, 8), np.float32)
    spec = api.ModelSpec(dtype=api.DATA_TYPE_FLOAT32)  # converted, in slices
    with ThreadPoolExecutor(1) as loader:
        loading = loader.submit(client.load_model, "large", weights="large", spec=spec)
        answered = 0
        while not loading.done():
            client.attend(query, query, query, timeout=5.0)
            answered += 1
        assert loading.result().weight_bytes >= 8 * 4 * 1024 * 1024 * 4
    assert answered >= 5
    shutil.rmtree(directory)

"""The examples of docs/cpp-api.md: core in a program of its own, held against transformers."""

import re
import subprocess

import numpy as np
import pytest
import torch

from end_to_end import hf_models
from end_to_end.causal_models import VOCABULARY, attention_calls, make_causal

TOKENS = 37


def _sentence(vocabulary):
    generator = torch.Generator().manual_seed(6)
    return torch.randint(2, vocabulary, (1, TOKENS), generator=generator)


def _bert():
    model = hf_models.make_bert(seed=8, num_hidden_layers=2)
    return model, hf_models.bert_calls(model, _sentence(500))


def _llama():
    model = make_causal("llama", seed=9)
    return model, attention_calls(model, input_ids=_sentence(VOCABULARY))


def _vit():
    model = hf_models.make_vit(seed=10, num_hidden_layers=2)
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(11))
    return model, hf_models.vit_calls(model, pixels)


MODELS = {"bert": (_bert, "language"), "llama": (_llama, "language"), "vit": (_vit, "vision")}


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    """A model's directory, its modality, and what its attention layers were given and returned."""
    make, modality = MODELS[request.param]
    made, calls = make()
    directory = tmp_path_factory.mktemp("cpp-library") / request.param
    made.save_pretrained(directory)
    return directory, modality, calls


@pytest.fixture
def run(attnd_binary):
    def run(example, *arguments, hidden_states=None):
        command = [attnd_binary.with_name(f"attnd_example_{example}"), *map(str, arguments)]
        data = b"" if hidden_states is None else hidden_states.numpy().astype("<f4").tobytes()
        return subprocess.run(command, input=data, capture_output=True, timeout=60)

    return run


def assert_checksum(result, expected):
    """The printed checksum is that of `expected` within float32's rounding."""
    assert result.returncode == 0, result.stderr
    (printed,) = re.findall(rb"^checksum (\S+)$", result.stdout, re.MULTILINE)
    values = expected.numpy().astype(np.float64).ravel()
    terms = (1 + np.arange(values.size) % 17) * values
    assert abs(float(printed) - terms.sum()) < 1e-5 * np.abs(terms).sum()


@pytest.mark.parametrize("implementation", ["auto", "standard", "torch_sdpa"])
def test_a_layer_of_a_directory(model, run, implementation):
    directory, _, calls = model
    for index, call in enumerate(calls):
        size = call.hidden_states.shape[-1]
        result = run(
            "layer", directory, index, size, implementation, hidden_states=call.hidden_states
        )
        assert_checksum(result, call.output)
        used, most = re.findall(rb"workspace (\d+) of at most (\d+) bytes", result.stdout)[0]
        assert int(used) > 0
        if implementation == "standard":
            assert int(used) <= int(most)


def test_a_model_by_its_modality(model, run):
    directory, modality, calls = model
    for index, call in enumerate(calls):
        arguments = ("modalities", directory, modality, index)
        result = run(*arguments, hidden_states=call.hidden_states)
        assert_checksum(result, call.output)
        assert f"{modality}: {len(calls)} layers" in result.stdout.decode().splitlines()


def test_what_is_wrong_is_said(model, run, tmp_path):
    directory, _, calls = model
    size = calls[0].hidden_states.shape[-1]
    missing = run("layer", tmp_path / "nothing", 0, size)
    assert missing.returncode == 1
    assert b"INVALID_ARGUMENT" in missing.stderr
    beyond = run("layer", directory, len(calls), size)
    assert beyond.returncode == 1
    assert b"NOT_FOUND" in beyond.stderr
    unknown = run("layer", directory, 0, size, "no_such")
    assert unknown.returncode == 1
    assert b"no_such" in unknown.stderr
    other = run("modalities", directory, "multimodal", 0)
    assert other.returncode == 1
    assert other.stdout.decode().splitlines()[-1] == "multimodal: 0 layers"
    assert run("layer").returncode == 2

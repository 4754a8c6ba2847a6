"""Greedy tokens of causal language models through sessions against the library's own."""

from contextlib import ExitStack

import pytest
import torch

from end_to_end import causal_models
from end_to_end.decoder import Decoder, library_greedy

COUNT = 32
# Beyond the windows of 16, and beyond the 32 positions after which phi3's factors change: there the
# library computes its whole cache anew, where a server's cached keys stay as they were rotated.
PROMPT_LENGTHS = [41, 33, 57]

FAMILIES = pytest.mark.parametrize("family", causal_models.FAMILIES)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Layers this small are slower on several, which besides take the server's cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def decoders(client, model_root):
    with ExitStack() as stack:
        made = {}
        for family in causal_models.FAMILIES:
            model = causal_models.make_causal(family, seed=31)
            name = f"decoding-{family}"
            model.save_pretrained(model_root / name)
            client.load_model(name, weights=name)
            stack.callback(client.unload_model, name, close_sessions=True)
            made[family] = model, name
        yield lambda family: Decoder(client, *made[family])


def prompts(seed=6):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(3, causal_models.VOCABULARY, (length,), generator=generator).tolist()
        for length in PROMPT_LENGTHS
    ]


@pytest.fixture(scope="module")
def expected(decoders):
    """The library's continuations of all prompts, by family; computed once."""
    known = {}

    def continuations(family):
        if family not in known:
            model = decoders(family).model
            known[family] = [library_greedy(model, prompt, COUNT) for prompt in prompts()]
            # Tokens that are always the same would say little.
            assert all(len(set(tokens)) > COUNT // 4 for tokens in known[family])
        return known[family]

    return continuations


def lengths(session):
    return {cache.length for cache in session.get().layers}


@FAMILIES
def test_one_prompt(decoders, expected, family):
    decoder = decoders(family)
    with decoder.open() as session:
        assert decoder.greedy([session], prompts()[:1], COUNT) == expected(family)[:1]
        assert len(session.get().layers) == causal_models.LAYERS
        # The last token was never fed.
        assert lengths(session) == {PROMPT_LENGTHS[0] + COUNT - 1}


@FAMILIES
def test_prompts_of_different_lengths_in_one_batch(decoders, expected, family):
    decoder = decoders(family)
    sessions = [decoder.open() for _ in PROMPT_LENGTHS]
    assert decoder.greedy(sessions, prompts(), COUNT) == expected(family)


@FAMILIES
def test_prompts_in_chunks(decoders, expected, family):
    """Of different sizes beside each other; one row's prompt ends before the others'."""
    decoder = decoders(family)
    sessions = [decoder.open() for _ in PROMPT_LENGTHS]
    ends = [(33, 33, 34), (34, 33, 50), (41, 33, 57)]
    starts = (0, 0, 0)
    last = [None] * 3
    for chunk_ends in ends:
        chunk = [
            prompt[start:end]
            for prompt, start, end in zip(prompts(), starts, chunk_ends, strict=True)
        ]
        logits = decoder.feed(sessions, chunk)
        last = [new if part else old for new, part, old in zip(logits, chunk, last, strict=True)]
        starts = chunk_ends
    first = [int(row.argmax()) for row in last]
    rest = decoder.greedy(sessions, [[token] for token in first], COUNT - 1)
    found = [[token, *tokens] for token, tokens in zip(first, rest, strict=True)]
    assert found == expected(family)


@FAMILIES
def test_every_step_sent_twice(decoders, expected, family):
    decoder = decoders(family)
    decoder.calls = 2
    sessions = [decoder.open() for _ in PROMPT_LENGTHS]
    assert decoder.greedy(sessions, prompts(), COUNT) == expected(family)
    for session, length in zip(sessions, PROMPT_LENGTHS, strict=True):
        assert lengths(session) == {length + COUNT - 1}


@FAMILIES
def test_a_session_that_is_cut_and_replayed(decoders, expected, family):
    """After 20 tokens the last 9 are cut and others come in their place; then they are replayed."""
    decoder = decoders(family)
    prompt, tokens = prompts()[0], expected(family)[0]
    session = decoder.open()
    assert decoder.greedy([session], [prompt], 20) == [tokens[:20]]
    keep = len(prompt) + 10
    others = [(token + 1) % causal_models.VOCABULARY for token in tokens[10:19]]
    decoder.feed([session], [others], truncate=[keep])
    (logits,) = decoder.feed([session], [tokens[10:20]], truncate=[keep])
    assert lengths(session) == {len(prompt) + 20}
    next_token = int(logits.argmax())
    rest = decoder.greedy([session], [[next_token]], COUNT - 21)
    assert [next_token, *rest[0]] == tokens[20:]


@FAMILIES
def test_forks_that_continue_differently(decoders, expected, family):
    decoder = decoders(family)
    prompt, tokens = prompts()[1], expected(family)[1]
    parent = decoder.open()
    assert decoder.greedy([parent], [prompt], 12) == [tokens[:12]]
    forks = parent.fork(2)
    # Neither fork takes the parent's twelfth token; what they are given instead makes three texts.
    given = [(tokens[11] + offset) % causal_models.VOCABULARY for offset in (1, 2)]
    found = decoder.greedy(forks, [[token] for token in given], COUNT)
    for token, continuation in zip(given, found, strict=True):
        assert continuation == library_greedy(decoder.model, [*prompt, *tokens[:11], token], COUNT)
    assert found[0] != found[1]
    assert decoder.greedy([parent], [tokens[11:12]], COUNT - 12) == [tokens[12:]]


@FAMILIES
def test_a_fork_of_an_earlier_length(decoders, expected, family):
    decoder = decoders(family)
    prompt, tokens = prompts()[2], expected(family)[2]
    parent = decoder.open()
    decoder.greedy([parent], [prompt], 25)
    (fork,) = parent.fork(length=len(prompt) + 7)
    parent.close()  # what they share stays
    assert decoder.greedy([fork], [tokens[7:8]], COUNT - 8) == [tokens[8:]]


@FAMILIES
def test_modes_of_forward(decoders, family):
    """Queries of READ_ONLY stand at the cache's end; what DISCARD is answered APPEND is, too."""
    decoder = decoders(family)
    generator = torch.Generator().manual_seed(8)
    hidden_states = torch.randn(1, 50, decoder.model.config.hidden_size, generator=generator)
    with decoder.open() as session:
        for layer in range(causal_models.LAYERS):
            common = {"model": decoder.name, "layer": layer, "sessions": [session]}
            prompt = decoder.client.forward(hidden_states[:, :44], **common)
            asked = decoder.client.forward(
                hidden_states[:, 41:44], cache_mode="read_only", **common
            )
            assert torch.allclose(asked.output, prompt.output[:, 41:], atol=1e-5)
            dropped, kept = (
                decoder.client.forward(hidden_states[:, 44:], cache_mode=mode, **common)
                for mode in ("discard", "append")
            )
            assert dropped.cache_length == (44,)
            assert kept.cache_length == (50,)
            assert torch.allclose(dropped.output, kept.output, atol=1e-6)


def test_implementations_change_in_the_middle(decoders, expected):
    decoder = decoders("llama")
    session = decoder.open()
    tokens = expected("llama")[0]
    logits = decoder.feed([session], [prompts()[0]])
    for index, token in enumerate(tokens):
        assert int(logits[0].argmax()) == token
        decoder.implementation = ("torch_sdpa", "standard", "auto", "")[index % 4]
        logits = decoder.feed([session], [[token]])


def test_a_model_whose_scaling_follows_the_length(client, decoders, model_root):
    """The dynamic scaling's frequencies grow with every token; cached keys stay as they were."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model = causal_models.make_causal(
        "llama", seed=32, max_position_embeddings=32, rope_parameters=rope
    )
    model.save_pretrained(model_root / "decoding-dynamic")
    client.load_model("decoding-dynamic", weights="decoding-dynamic")
    decoder = Decoder(client, model, "decoding-dynamic")
    prompt = prompts()[0][:20]
    with decoder.open() as session:
        assert decoder.greedy([session], [prompt], COUNT) == [library_greedy(model, prompt, COUNT)]
    client.unload_model("decoding-dynamic")

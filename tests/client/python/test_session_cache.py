"""A SessionCache's bookkeeping, and what the attention function refuses; without a model."""

import copy
import sys

import grpc
import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers import masking_utils as library

import attnd
from attnd import errors, huggingface
from attnd.huggingface import masks

NAME = "attnd-of-a-test"
HEADS, DIM = 2, 4


class Layer(torch.nn.Module):
    is_causal = True
    layer_idx = 0

    def forward(self, hidden_states, attention_mask=None):
        raise AssertionError


class CrossLayer(Layer):
    is_causal = False

    def forward(self, hidden_states, encoder_hidden_states, attention_mask=None):
        raise AssertionError


@pytest.fixture
def function(fake):
    with huggingface.register(fake.address, name=NAME, timeout=30.0):
        yield AttentionInterface()[NAME]


@pytest.fixture
def cache(fake_client):
    return huggingface.SessionCache(fake_client)


def states(batch, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, batch, HEADS, count, DIM, generator=generator)


def mask_of(cache, batch, count, padding=None, layer=0):
    """As a model asks for it, before its layers run."""
    past = 0 if cache is None else cache.get_seq_length(layer)
    return AttentionMaskInterface()[NAME](
        batch, count, past + count, q_offset=past, attention_mask=padding
    )


def attend(function, cache, batch, count, *, seed=0, padding=None, layer=0, **named):
    query, key, value = states(batch, count, seed)
    mask = named.pop("mask", None)
    if mask is None:
        mask = mask_of(cache, batch, count, padding, layer)
    if cache is not None:
        key, value = cache.update(key, value, layer)
    return function(Layer(), query, key, value, mask, **named)[0]


def whole(function, batch, counts):
    """The last tokens' attention, without a session."""
    parts = [states(batch, count, seed) for seed, count in enumerate(counts)]
    query, key, value = torch.cat(parts, dim=3)
    mask = mask_of(None, batch, sum(counts))
    return function(Layer(), query, key, value, mask)[0][:, -counts[-1] :]


@pytest.mark.usefixtures("function")
def test_the_client_is_the_registered_one(fake, fake_client, monkeypatch):
    assert huggingface.SessionCache().client.address == fake.address
    assert huggingface.SessionCache(fake_client).client is fake_client
    monkeypatch.setattr("attnd.huggingface.cache._registered", None)
    with pytest.raises(RuntimeError, match="register"):
        huggingface.SessionCache()


def test_new_tokens_alone_are_sent(function, fake, cache):
    for seed, count in enumerate((5, 1, 2)):
        output = attend(function, cache, 3, count, seed=seed)
        sent = fake.attended[-1]
        assert list(sent.kv_lengths) == list(sent.query_lengths) == [count] * 3
        assert sent.key.shape == [3 * count, HEADS, DIM]
        assert list(sent.past_key_value.sessions.step) == [seed + 1] * 3
    torch.testing.assert_close(output, whole(function, 3, (5, 1, 2)))
    assert cache.get_seq_length() == 8
    assert cache.get_mask_sizes(1, 0) == (9, 0)
    assert [cache.layers[0].keys.shape[2], cache.is_croppable, cache.is_compileable] == [0, 1, 0]


def test_padding_is_neither_sent_nor_cached(function, fake, cache):
    padding = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]]).bool()
    output = attend(function, cache, 3, 4, padding=padding)
    assert list(fake.attended[-1].kv_lengths) == [2, 4, 3]
    assert not fake.attended[-1].HasField("attention_mask")
    assert (output[~padding] == 0).all()
    assert (output[padding] != 0).all()
    padding = torch.cat([padding, torch.tensor([[1], [0], [1]]).bool()], dim=1)
    attend(function, cache, 3, 1, padding=padding)
    assert list(fake.attended[-1].kv_lengths) == [1, 0, 1]
    assert list(fake.attended[-1].past_key_value.sessions.cache_position) == [2, 4, 3]
    with pytest.raises(ValueError, match="padding mask differs"):
        attend(function, cache, 3, 1)


def test_beams_keep_fork_and_close_sessions(function, fake, cache):
    for layer in (0, 1):
        attend(function, cache, 4, 3, layer=layer)
    a, b, c, d = cache.sessions
    cache.reorder_cache(torch.tensor([0, 1, 2, 3]))
    assert fake.forked == []
    cache.reorder_cache(torch.tensor([2, 1, 2, 2]))
    # One call for both of row 2's forks, for all layers: it goes on in the first row itself.
    assert fake.forked == [(c, 2)]
    assert cache.sessions[:2] == (c, b)
    assert sorted(fake.closed) == sorted([a, d])
    assert set(cache.sessions) == set(fake.sessions)
    assert len(set(cache.sessions)) == 4
    attend(function, cache, 4, 1, layer=1)
    assert [len(fake.sessions[session][1].key) for session in cache.sessions] == [4] * 4


def test_rows_move_with_their_padding(function, fake, cache):
    padding = torch.tensor([[0, 0, 1], [1, 1, 1]]).bool()
    attend(function, cache, 2, 3, padding=padding)
    cache.reorder_cache(torch.tensor([1, 1]))
    attend(function, cache, 2, 1)
    assert list(fake.attended[-1].past_key_value.sessions.cache_position) == [3, 3]
    cache.batch_repeat_interleave(2)
    assert len(set(cache.sessions)) == 4
    cache.batch_select_indices(torch.tensor([3, 0]))
    assert set(cache.sessions) == set(fake.sessions)
    assert len(cache.sessions) == 2


def test_forks_that_fail_leave_the_cache_as_it_was(function, fake, cache, monkeypatch):
    attend(function, cache, 3, 2)
    before = cache.sessions
    fork_session = cache.client.fork_session

    def second_fails(session, **arguments):
        if session == before[1]:
            raise errors.ResourceExhausted("no memory")
        return fork_session(session, **arguments)

    monkeypatch.setattr(cache.client, "fork_session", second_fails)
    with pytest.raises(errors.ResourceExhausted):
        cache.batch_repeat_interleave(2)
    assert cache.sessions == before
    assert set(fake.sessions) == set(before)
    attend(function, cache, 3, 1)


def test_a_cut_travels_with_the_next_tokens(function, fake, cache):
    padding = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]).bool()
    attend(function, cache, 2, 4, padding=padding)
    calls = len(fake.attended)
    cache.crop(-3)
    assert cache.get_seq_length() == 1
    assert len(fake.attended) == calls
    padding = torch.tensor([[0, 1], [1, 1]]).bool()
    attend(function, cache, 2, 1, padding=padding, seed=1)
    batch = fake.attended[-1].past_key_value.sessions
    assert list(batch.truncate) == list(batch.cache_position) == [0, 1]
    attend(function, cache, 2, 1, padding=torch.tensor([[0, 1, 1], [1, 1, 1]]).bool())
    assert list(fake.attended[-1].past_key_value.sessions.truncate) == []
    with pytest.raises(ValueError, match="crop"):
        cache.crop(2)


def test_lost_answers_append_once(function, fake, cache):
    attend(function, cache, 2, 3)
    fake.losses += [grpc.StatusCode.UNAVAILABLE] * 2
    output = attend(function, cache, 2, 2, seed=1)
    torch.testing.assert_close(output, whole(function, 2, (3, 2)))
    assert [layer[0].length for layer in fake.sessions.values()] == [5, 5]


def test_a_call_that_failed_in_the_end_can_be_made_again(function, fake, cache):
    attend(function, cache, 2, 3)
    fake.losses += [grpc.StatusCode.UNAVAILABLE] * 3
    with pytest.raises(errors.Unavailable):
        attend(function, cache, 2, 2, seed=1)
    assert cache.get_seq_length() == 3
    output = attend(function, cache, 2, 2, seed=1)
    torch.testing.assert_close(output, whole(function, 2, (3, 2)))


def test_forks_and_copies_go_on_by_themselves(function, fake, cache):
    attend(function, cache, 2, 3)
    cache.crop(-1)
    with cache.fork() as fork, copy.deepcopy(cache) as other:
        assert len({*fork.sessions, *other.sessions, *cache.sessions}) == 6
        attend(function, fork, 2, 1, seed=1)
        attend(function, fork, 2, 1, seed=2)
        assert (fork.get_seq_length(), other.get_seq_length(), cache.get_seq_length()) == (4, 2, 2)
    attend(function, cache, 2, 1, seed=1)
    assert list(fake.attended[-1].past_key_value.sessions.truncate) == [2, 2]
    assert set(fake.sessions) == set(cache.sessions)
    cache.reset()
    assert not fake.sessions
    assert cache.get_seq_length() == 0


def test_sessions_are_all_opened_or_none(function, fake, cache, monkeypatch):
    opened = []
    open_session = cache.client.open_session

    def third_fails(*arguments, **named):
        if len(opened) == 2:
            raise errors.ResourceExhausted("no memory")
        opened.append(open_session(*arguments, **named))
        return opened[-1]

    monkeypatch.setattr(cache.client, "open_session", third_fails)
    with pytest.raises(errors.ResourceExhausted):
        attend(function, cache, 3, 1)
    assert cache.sessions == ()
    assert not fake.sessions


def test_another_batch_is_refused(function, cache):
    attend(function, cache, 2, 1)
    with pytest.raises(ValueError, match="3 rows for a cache of 2"):
        attend(function, cache, 3, 1)


def test_caches_are_not_mixed(function, fake_client, cache):
    local, other = DynamicCache(), huggingface.SessionCache(fake_client)
    attend(function, cache, 2, 3)
    query, key, value = states(2, 1)
    ours, _ = cache.update(key, value, 1)
    _, theirs = other.update(key, value, 1)
    for mixture in ((ours, value), (key, theirs), (ours, theirs)):
        with pytest.raises(ValueError, match="different caches"):
            function(Layer(), query, *mixture, mask_of(None, 2, 1))
    attend(function, local, 2, 3)
    mask = mask_of(local, 2, 1)
    with pytest.raises(ValueError, match="cache"):
        attend(function, None, 2, 1, mask=mask)
    with pytest.raises(ValueError, match="cache"):
        attend(function, huggingface.SessionCache(fake_client), 2, 1, mask=mask)


def test_tokens_that_never_reached_the_function_are_missed(cache):
    _, key, value = states(2, 1)
    cache.update(key, value, 0)
    with pytest.raises(RuntimeError, match="attn_implementation"):
        cache.update(key, value, 0)


@pytest.mark.parametrize(
    ("named", "word"),
    [
        ({"head_mask": torch.ones(2)}, "head_mask"),
        ({"cu_seq_lens_q": torch.ones(2)}, "cu_seq_lens_q"),
        ({"of_the_future": False}, "of_the_future"),
        ({"dropout": 0.1}, "dropout"),
    ],
)
def test_what_would_change_the_result_is_refused_by_name(function, fake, named, word):
    with pytest.raises(NotImplementedError, match=word):
        attend(function, None, 1, 2, **named)
    assert fake.attended == []


def test_what_would_not_is_not(function):
    known = {"position_ids": torch.ones(2), "use_cache": True, "head_mask": None}
    attend(function, None, 1, 2, **known)


def test_training_is_refused(function):
    query, key, value = states(1, 2).requires_grad_()
    mask = mask_of(None, 1, 2)
    with pytest.raises(NotImplementedError, match="gradients"):
        function(Layer(), query, key, value, mask)
    with torch.no_grad():
        function(Layer(), query, key, value, mask)
    function(Layer().eval(), query, key, value, mask)


def test_options_travel(function, fake):
    window = library.sliding_window_causal_mask_function(3)
    mask = masks.describe(1, 5, 5, mask_function=window)
    options = {"scaling": 0.25, "softcap": 3.0, "s_aux": torch.tensor([0.5, -1.0])}
    attend(function, None, 1, 5, mask=mask, sliding_window=3, **options)
    sent = fake.attended[-1].options
    assert (sent.scale, sent.soft_cap, list(sent.sink_logits.values)) == (0.25, 3.0, [0.5, -1.0])
    assert (sent.is_causal, sent.window_left, sent.window_right) == (True, 2, -1)
    assert not fake.attended[-1].HasField("attention_mask")


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.float16])
def test_a_position_bias_is_added(function, fake, bias_dtype):
    query, key, value = states(2, 4)
    bias = torch.randn(1, HEADS, 4, 4, generator=torch.Generator().manual_seed(1)).to(bias_dtype)
    padding = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]]).bool()
    mask = masks.describe(2, 4, 4, attention_mask=padding)
    output, _ = function(Layer(), query, key, value, mask, position_bias=bias)
    scores = query @ key.mT / DIM**0.5 + bias
    scores = scores.masked_fill(~mask.matrix, -torch.inf)
    expected = (scores.softmax(-1).nan_to_num() @ value).transpose(1, 2)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_other_masks_travel_as_they_are(function, fake, cache, dtype):
    generator = torch.Generator().manual_seed(2)
    visible = torch.rand(2, 1, 3, 7, generator=generator) < 0.7
    visible[..., 0] = True
    mask = visible if dtype is torch.bool else torch.where(visible, 0.0, -1e30)
    query, key, value = states(2, 3)
    past_key, past_value = states(2, 2, seed=1)[1:]
    attend(function, cache, 2, 2, seed=1)
    new_key, new_value = cache.update(key, value, 0)
    output, _ = function(Layer(), query, new_key, new_value, mask)
    key, value = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, visible[..., :5]
    ).transpose(1, 2)
    torch.testing.assert_close(output, expected)
    with pytest.raises(ValueError, match="mask"):
        function(Layer(), query, key, value, mask[..., :4])


def test_the_encoders_padding_is_not_the_queries(function, fake):
    """Of the same length, where a mask alone does not say whose padding it is."""
    query, key, value = states(2, 3)
    padding = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    mask = masks.describe(
        2, 3, 3, mask_function=library.bidirectional_mask_function, attention_mask=padding
    )
    crossed, _ = function(CrossLayer(), query, key, value, mask)
    assert list(fake.attended[-1].query_lengths) == [3, 3]
    assert list(fake.attended[-1].kv_lengths) == [2, 3]
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask.matrix)
    torch.testing.assert_close(crossed, expected.transpose(1, 2))
    alone, _ = function(Layer(), query, key, value, mask)
    assert list(fake.attended[-1].query_lengths) == [2, 3]
    torch.testing.assert_close(alone[padding], crossed[padding])


def test_no_mask_is_what_sdpa_makes_of_it(function):
    layer = Layer()
    query, key, value = states(1, 4)
    sdpa = AttentionInterface()["sdpa"]
    for queries, named in ((4, {}), (2, {}), (1, {}), (4, {"is_causal": False})):
        part = query[:, :, :queries]
        output, _ = function(layer, part, key, value, None, **named)
        torch.testing.assert_close(output, sdpa(layer, part, key, value, None, **named)[0])


def test_without_transformers_the_error_says_what_to_install(monkeypatch):
    for module in [name for name in sys.modules if name.startswith("attnd.huggingface")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delattr(attnd, "huggingface")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install"):
        __import__("attnd.huggingface")

"""The life of a session through the Python client."""

import ml_dtypes
import numpy as np
import pytest

from attnd import errors
from end_to_end import causal_models, reference
from end_to_end.observe import session_prefixes

HEADS, KV_HEADS, DIM = 4, 2, 16
EXACT = 2e-5  # float32, absolute; outputs are of the order of 1


def tokens(count, seed):
    return reference.random_problem(
        seed, batch=1, heads=HEADS, kv_heads=KV_HEADS, q_len=count, kv_len=count, head_dim=DIM
    )


class Sequence:
    """All tokens of a session, kept here: what the server must answer."""

    def __init__(self, parts=()):
        self.parts = list(parts)

    def append(self, part, **options):
        self.parts.append(part)
        return self.attend(part[0], **options)

    def attend(self, query, **options):
        key, value = (np.concatenate([part[at] for part in self.parts], axis=2) for at in (1, 2))
        return reference.attend(query, key, value, is_causal=True, **options).output


def append(session, part, **arguments):
    return session.attend(*part, is_causal=True, **arguments)


def lengths(client, session):
    return {layer.layer: layer.length for layer in client.get_session(session).layers}


@pytest.fixture
def session(client):
    with client.open_session() as opened:
        yield opened


@pytest.fixture
def lose_answers(client, monkeypatch):
    """Makes the answers of the next calls be lost, after the server has done its work."""
    attend, lost = client.attend, []

    def lossy(*arguments, **named):
        result = attend(*arguments, **named)
        if lost:
            raise lost.pop()
        return result

    monkeypatch.setattr(client, "attend", lossy)
    return lost.extend


def test_tokens_are_appended_by_layer(client, session):
    sequences = {0: Sequence(), 7: Sequence()}
    for seed, (layer, count) in enumerate([(0, 5), (7, 70), (0, 1), (0, 64), (7, 1)]):
        part = tokens(count, seed)
        result = append(session, part, layer=layer)
        expected = sequences[layer].append(part)
        np.testing.assert_allclose(result.output, expected, atol=EXACT)
        assert result.cache_length == (session.length(layer),)
    assert lengths(client, session) == {0: 70, 7: 71} == {n: session.length(n) for n in (0, 7)}
    assert [layer.last_step for layer in session.get().layers] == [3, 2]


def test_rows_of_one_call_have_sessions_of_their_own(client):
    counts = [3, 65, 1]
    with client.open_session() as a, client.open_session() as b, client.open_session() as c:
        sequences = [Sequence(), Sequence(), Sequence()]
        for turn in range(3):
            parts = [tokens(count, 10 * turn + row) for row, count in enumerate(counts)]
            packed = [np.concatenate([part[at][0] for part in parts], axis=1) for at in range(3)]
            result = client.attend(
                *(array.swapaxes(0, 1) for array in packed),
                layout="packed",
                query_lengths=counts,
                kv_lengths=counts,
                is_causal=True,
                sessions=[a, b.id, c],
                step=turn + 1,
                cache_position=[count * turn for count in counts],
            )
            rows = np.split(result.output, np.cumsum(counts)[:-1])
            for row, part, sequence in zip(rows, parts, sequences, strict=True):
                expected = sequence.append(part)[0].swapaxes(0, 1)
                np.testing.assert_allclose(row, expected, atol=EXACT)
        assert result.cache_length == tuple(3 * count for count in counts)


def test_forks_continue_differently(client, session):
    sequence = Sequence()
    for seed in (1, 2):
        part = tokens(40, seed)
        append(session, part)
        sequence.append(part)
    forks = session.fork(3, length=60)
    cut = Sequence([sequence.parts[0], [array[:, :, :20] for array in sequence.parts[1]]])
    for seed, fork in enumerate(forks):
        part = tokens(5, 20 + seed)
        expected = Sequence(cut.parts).append(part)
        np.testing.assert_allclose(append(fork, part).output, expected, atol=EXACT)
        assert fork.length() == 65
    part = tokens(2, 30)
    np.testing.assert_allclose(append(session, part).output, sequence.append(part), atol=EXACT)
    for fork in forks:
        fork.close()
    assert lengths(client, session) == {0: 82}


@pytest.mark.parametrize("lost", [errors.Unavailable, errors.DeadlineExceeded])
def test_a_lost_answer_appends_once(client, session, lose_answers, lost):
    sequence = Sequence()
    for seed in range(4):
        part = tokens(17, seed)
        lose_answers([lost("on the way")] * (seed % 3))
        np.testing.assert_allclose(append(session, part).output, sequence.append(part), atol=EXACT)
    assert lengths(client, session) == {0: 68}


def test_a_call_that_failed_in_the_end_is_replaced(client, session, lose_answers):
    sequence = Sequence()
    part = tokens(5, 0)
    append(session, part)
    sequence.append(part)
    lose_answers([errors.Unavailable("on the way")] * 3)
    with pytest.raises(errors.Unavailable):
        append(session, tokens(9, 1))
    assert lengths(client, session) == {0: 14}
    part = tokens(2, 2)
    np.testing.assert_allclose(append(session, part).output, sequence.append(part), atol=EXACT)
    assert lengths(client, session) == {0: 7}


def test_the_same_step_twice_and_late_ones(client, session):
    one, two = tokens(6, 1), tokens(3, 2)
    call = {"sessions": [session], "is_causal": True}
    first = client.attend(*one, **call, step=5)
    again = client.attend(*one, **call, step=5)
    np.testing.assert_array_equal(first.output, again.output)
    assert again.cache_length == (6,)
    client.attend(*two, **call, step=9)
    for late in (5, 8):
        with pytest.raises(errors.Aborted) as caught:
            client.attend(*one, **call, step=late)
        assert (caught.value.details["length"], caught.value.details["step"]) == ("9", "9")
    assert lengths(client, session) == {0: 9}


def test_cut_and_position(client, session):
    sequence = Sequence()
    part = tokens(30, 1)
    append(session, part)
    with pytest.raises(errors.OutOfRange):
        append(session, part, truncate=31)
    with pytest.raises(errors.OutOfRange):
        append(session, part, cache_position=31)
    with pytest.raises(errors.Aborted):
        append(session, part, cache_position=29)
    assert lengths(client, session) == {0: 30}
    sequence.parts.append([array[:, :, :12] for array in part])
    part = tokens(4, 2)
    result = append(session, part, truncate=12, cache_position=12)
    np.testing.assert_allclose(result.output, sequence.append(part), atol=EXACT)
    assert session.length() == 16


def test_read_only_and_discard_keep_nothing(client, session):
    sequence = Sequence()
    part = tokens(20, 1)
    append(session, part)
    sequence.append(part)
    query = tokens(3, 2)[0]
    result = session.attend(query, cache_mode="read_only", is_causal=True)
    np.testing.assert_allclose(result.output, sequence.attend(query), atol=EXACT)
    more = tokens(3, 3)
    result = session.attend(*more, cache_mode="discard", is_causal=True)
    np.testing.assert_allclose(result.output, Sequence(sequence.parts).append(more), atol=EXACT)
    assert result.cache_length == (20,)
    result = session.attend(query, cache_mode="read_only", truncate=10, is_causal=True)
    cut = Sequence([[array[:, :, :10] for array in part]])
    np.testing.assert_allclose(result.output, cut.attend(query), atol=EXACT)
    assert lengths(client, session) == {0: 20}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_of_the_cache(client, dtype):
    name = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    part = tokens(33, 1)
    with client.open_session(cache_dtype=dtype) as session:
        result = append(session, part)
    rounded = [part[0], *(array.astype(name).astype(np.float32) for array in part[1:])]
    np.testing.assert_allclose(result.output, Sequence().append(rounded), atol=EXACT)


def test_steps_of_a_hosted_models_layer(client, model_root):
    causal_models.make_causal("llama").save_pretrained(model_root / "python-sessions")
    client.load_model("python-sessions", weights="python-sessions")
    random = np.random.default_rng(0)
    hidden = random.standard_normal((1, 30, 64), dtype=np.float32)
    expected = client.forward(hidden, model="python-sessions", layer=1).output
    with client.open_session("python-sessions", reserve_tokens=64) as session:
        for begin, end in ((0, 20), (20, 21), (21, 30)):
            result = session.forward(hidden[:, begin:end], layer=1)
            np.testing.assert_allclose(result.output, expected[:, begin:end], atol=1e-4)
        assert session.length(1) == 30
        assert client.get_session(session).model == "python-sessions"
        listed = client.list_sessions("python-sessions")
        assert [(status.model, status.length) for status in listed] == [("python-sessions", 30)]
        with pytest.raises(errors.NotFound):
            append(session, tokens(1, 0), model="")
        client.unload_model("python-sessions", close_sessions=True)
        with pytest.raises(errors.NotFound):
            session.forward(hidden[:, :1], layer=1)
        # Leaving the context closes what is closed already: no error.


def test_sessions_are_listed_over_all_pages(client):
    before = session_prefixes(client)
    opened = [client.open_session() for _ in range(130)]  # a page is 100
    listed = session_prefixes(client)
    assert {session.id[:8] for session in opened} <= listed
    assert not listed & {session.id for session in opened}
    for session in opened:
        client.close_session(session.id)
    assert session_prefixes(client) <= before


def test_wrong_sessions(client, session):
    part = tokens(2, 0)
    append(session, part)
    for wrong in ("", "no-such-session", session.id[:-1], session.id.upper() + "0"):
        with pytest.raises((errors.NotFound, errors.InvalidArgument)):
            client.attend(*part, sessions=[wrong])
    with pytest.raises(errors.NotFound):
        client.get_session("no-such-session")
    with pytest.raises(errors.NotFound):
        client.fork_session("no-such-session")
    with pytest.raises(errors.NotFound):
        client.open_session("no-such-model")
    with pytest.raises(errors.NotFound):
        append(session, part, model="no-such-model")
    client.close_session("no-such-session")
    two = [np.concatenate([array, array]) for array in part]
    with pytest.raises(errors.InvalidArgument):
        client.attend(*two, sessions=[session, session])
    with pytest.raises(errors.InvalidArgument):
        client.attend(*two, sessions=[session])
    with pytest.raises(errors.InvalidArgument):
        client.attend(*part, sessions=[session], cache_mode="discard", step=3)
    assert lengths(client, session) == {0: 2}


def test_one_bad_row_changes_no_session(client, session):
    part = tokens(2, 0)
    two = [np.concatenate([array, array]) for array in part]
    with client.open_session() as closed:
        pass
    with pytest.raises(errors.NotFound):
        client.attend(*two, sessions=[session, closed])
    with client.open_session() as good, pytest.raises(errors.OutOfRange):
        client.attend(*two, sessions=[good, session], cache_position=[0, 5])
    assert lengths(client, session) == {}


def test_a_session_expires(start_server, connect):
    server = start_server()
    other = connect(server.address)
    session = other.open_session(time_to_live=0.05)
    while other.list_sessions():  # which touches none
        pass
    with pytest.raises(errors.NotFound):
        append(session, tokens(1, 0))
    session.close()

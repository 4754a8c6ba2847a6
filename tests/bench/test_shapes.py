"""Shapes, rows and the double-precision reference."""

import numpy as np
import pytest
from kernelbench.docs import BEGIN, END, replaced
from kernelbench.inputs import gaussian
from kernelbench.reference import Reference, sampled_rows
from kernelbench.shapes import (
    D2,
    P1,
    Choice,
    Shape,
    custom_row,
    problem_of,
    quick_rows,
    sweep_rows,
    table_rows,
    workspace_rows,
)

CHOICE = Choice("flash", ("torch",), {"flash": "O(n)", "standard": "O(n^2)"})


def test_parse():
    assert Shape.parse("1,4,2,16,100,32") == Shape(1, 4, 2, 16, 100, 32, 32)
    assert Shape.parse("1,4,2,16,100,32,48").value_dim == 48
    assert str(Shape.parse("1,4,2,16,100,32,48")) == "1,4,2,16,100,32,48"


@pytest.mark.parametrize("text", ["1,4,2,16,100", "1,4,3,16,100,32", "1,4,2,0,100,32", "a,b", ""])
def test_parse_refuses(text):
    with pytest.raises(ValueError, match=r"shape|heads"):
        Shape.parse(text)


def test_work():
    assert P1.flops(causal=False) == 4 * 32 * 2048 * 2048 * 128
    assert P1.flops(causal=True) == P1.flops(causal=False) / 2
    assert D2.cache_bytes("bfloat16") == 2 * 8 * 16384 * 128 * 2
    row = custom_row(CHOICE, D2, False, "float32")
    assert row.work() == D2.cache_bytes("float32")
    assert row.limit() == "read"


def test_titles_are_distinct():
    rows = table_rows(CHOICE) + sweep_rows(CHOICE) + workspace_rows(CHOICE)
    titles = [row.title for row in rows]
    assert len(set(titles)) == len(titles)


def test_quick_rows_keep_what_is_special():
    for row, small in zip(table_rows(CHOICE), quick_rows(table_rows(CHOICE)), strict=True):
        assert small.shape.group == row.shape.group
        assert (small.shape.q_len == 1) == (row.shape.q_len == 1)


def test_small_caches_are_used_in_turn():
    int8 = next(row for row in table_rows(CHOICE) if row.subject.cache_dtype == "int8")
    assert problem_of(int8, int8.subject)["cache_copies"] == 4
    assert problem_of(int8, int8.own[0])["cache_copies"] == 2
    prefill = table_rows(CHOICE)[0]
    assert problem_of(prefill, prefill.subject)["cache_copies"] == 1


def naive(shape, causal, tensors):
    output = np.zeros((shape.batch, shape.num_heads, shape.q_len, shape.value_dim))
    for b, h, i in np.ndindex(output.shape[:3]):
        last = i + shape.kv_len - shape.q_len if causal else shape.kv_len - 1
        kv = h // shape.group
        key = tensors["key"][b, kv, : last + 1].astype(np.float64)
        scores = key @ tensors["query"][b, h, i].astype(np.float64) / shape.head_dim**0.5
        weights = np.exp(scores) / np.exp(scores).sum()
        output[b, h, i] = weights @ tensors["value"][b, kv, : last + 1].astype(np.float64)
    return output


@pytest.mark.parametrize("causal", [False, True])
def test_reference_agrees_with_one_row_at_a_time(causal):
    shape = Shape(2, 4, 2, 5, 9, 8, 6)
    tensors = gaussian(shape, seed=1)
    expected = naive(shape, causal, tensors)
    reference = Reference(shape, causal, tensors)
    assert reference.errors(expected).max_abs < 1e-12
    wrong = expected.copy()
    wrong[1, 3, 4, 5] += 0.5
    assert reference.errors(wrong).max_abs == pytest.approx(0.5)
    wrong[0, 0, 0, 0] = np.nan
    assert reference.errors(wrong).rms == np.inf


def test_long_problems_are_sampled_with_their_ends():
    rows = sampled_rows(Shape(1, 8, 8, 65536, 65536, 128, 128))
    assert 4 <= len(rows) < 100
    assert (rows[0], rows[-1]) == (0, 65535)


def test_docs_replace_what_is_between_the_marks():
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert replaced(page, "new") == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
    assert replaced(replaced(page, "other"), "new") == replaced(page, "new")
    with pytest.raises(ValueError, match="no"):
        replaced("nothing", "new")

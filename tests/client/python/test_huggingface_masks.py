"""Masks of transformers as descriptions, and what of a padded batch is sent for them."""

import pytest
import torch
from transformers import masking_utils as library

from attnd.huggingface import masks, rows

CAUSAL = library.causal_mask_function
PADDING = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]).bool()
HOLES = torch.tensor([[1, 1, 0, 0, 1, 1], [0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()


def described(mask_function=CAUSAL, padding=None, q_length=6, kv_length=6, **offsets):
    return masks.describe(3, q_length, kv_length, **offsets, mask_function=mask_function,
                          attention_mask=padding)  # fmt: skip


def blocks(size=3):
    return library.chunked_overlay(size, torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize(
    ("mask_function", "pattern"),
    [
        (CAUSAL, masks.Pattern(is_causal=True)),
        (library.bidirectional_mask_function, masks.Pattern()),
        (library.sliding_window_causal_mask_function(4), masks.Pattern(True, 3)),
        (library.sliding_window_bidirectional_mask_function(4), masks.Pattern(False, 4, 4)),
        (
            library.and_masks(library.sliding_window_overlay(9), library.sliding_window_overlay(5)),
            masks.Pattern(False, 4),
        ),
        (library.chunked_causal_mask_function(3, torch.zeros(3)), None),
        (library.or_masks(CAUSAL, CAUSAL), None),
        (library.and_masks(CAUSAL, lambda b, h, q, k: k > 0), None),
        (lambda b, h, q, k: k <= q, None),
    ],
)
def test_recognised_by_what_they_were_made_of(mask_function, pattern):
    assert masks.recognise(mask_function) == pattern


def seen(sent):
    """The matrix that the API makes of what is sent, put back to its rows and columns."""
    batch, q_len, kv_len = len(sent.queries), sent.queries.shape[1], sent.keys.shape[1]
    whole = torch.zeros(batch, q_len, kv_len, dtype=torch.bool)
    mask = sent.mask()
    for row in range(batch):
        queries, keys = sent.queries[row].nonzero()[:, 0], sent.keys[row].nonzero()[:, 0]
        first = len(keys) - len(queries)
        if sent.first_query_position is not None:
            first = sent.first_query_position[row]
        distance = torch.arange(len(keys)) - (first + torch.arange(len(queries)))[:, None]
        visible = torch.ones_like(distance, dtype=torch.bool)
        if sent.pattern.is_causal:
            visible &= distance <= 0
        if sent.pattern.window_left >= 0:
            visible &= distance >= -sent.pattern.window_left
        if sent.pattern.window_right >= 0:
            visible &= distance <= sent.pattern.window_right
        if mask is not None:
            visible &= mask.expand(batch, -1, -1, -1)[row, 0, : len(queries), : len(keys)]
        for query, visible_keys in zip(queries, visible, strict=True):
            whole[row, query, keys] = visible_keys
    return whole


FUNCTIONS = {
    "causal": CAUSAL,
    "window": library.sliding_window_causal_mask_function(3),
    "both_ways": library.bidirectional_mask_function,
    "window_both_ways": library.sliding_window_bidirectional_mask_function(2),
    "chunks": library.and_masks(blocks(), CAUSAL),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("padding", [None, PADDING, HOLES], ids=["none", "ends", "holes"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"q_length": 6, "kv_length": 6},
        {"q_length": 2, "kv_length": 6, "q_offset": 4},
        {"q_length": 2, "kv_length": 4, "q_offset": 4, "kv_offset": 2},
        {"q_length": 3, "kv_length": 9, "q_offset": 3},  # a static cache with places left
    ],
    ids=["first", "later", "kept_window", "static"],
)
@pytest.mark.parametrize("one_sequence", [True, False])
def test_what_is_sent_shows_what_the_library_shows(name, padding, sizes, one_sequence):
    description = described(FUNCTIONS[name], padding, **sizes)
    sent = rows.described_rows(description, is_self_attention=one_sequence, from_cache=False)
    expected = description.matrix[:, 0] & sent.queries[..., None]
    assert torch.equal(seen(sent), expected)
    first = sizes.get("q_offset", 0)
    last = first + sizes["q_length"]
    if description.pattern is not None and description.pattern.is_causal:
        tokens = torch.ones(3, last, dtype=torch.bool) if padding is None else padding
        assert torch.equal(sent.queries, tokens[:, first:last])
        assert not sent.keys[:, last - sizes.get("kv_offset", 0) :].any()
    elif not one_sequence:
        assert sent.queries.all()


@pytest.mark.parametrize("name", ["causal", "window", "both_ways", "window_both_ways"])
@pytest.mark.parametrize("padding", [None, PADDING])
def test_ends_of_padding_need_no_matrix(name, padding):
    description = described(FUNCTIONS[name], padding)
    sent = rows.described_rows(description, is_self_attention=True, from_cache=False)
    assert sent.matrix is None
    assert sent.queries.sum() == sent.keys.sum() == (18 if padding is None else padding.sum())


def test_description_stays_one_where_nothing_is_cut_off():
    mask = described(FUNCTIONS["window"], PADDING)
    assert mask[:, :, :, :6] is mask
    assert mask[:, :, :, :9] is mask
    assert mask.to("cpu") is mask
    assert mask.to(dtype=torch.bool) is mask
    assert mask.contiguous() is mask
    assert masks.describe(3, 6, 6, attention_mask=mask) is mask
    assert (mask.shape, mask.ndim, mask.dtype) == ((3, 1, 6, 6), 4, torch.bool)
    assert mask.size(2) == 6


def test_description_is_the_librarys_matrix_to_who_takes_it_for_a_tensor():
    mask = described(FUNCTIONS["window"], PADDING)
    expected = library.sdpa_mask(
        3, 6, 6, mask_function=FUNCTIONS["window"], attention_mask=PADDING,
        allow_is_causal_skip=False,
    )  # fmt: skip
    assert torch.equal(mask[:, :, :2], expected[:, :, :2])
    assert torch.equal(mask[..., 1:], expected[..., 1:])
    assert torch.equal(~mask, ~expected)
    assert torch.equal(mask & expected, expected)
    assert torch.equal(expected & mask, expected)
    assert torch.equal(torch.cat([mask, expected]), torch.cat([expected, expected]))
    assert torch.equal(mask.float(), expected.float())
    assert torch.equal(mask.to(torch.float32), expected.to(torch.float32))
    assert torch.equal(torch.where(mask, 1.0, 2.0), torch.where(expected, 1.0, 2.0))

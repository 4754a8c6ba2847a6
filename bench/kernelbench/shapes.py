"""Shapes and contenders: what is measured, apart from how."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}

# Caches smaller than this are held several times and used in turn, as a model's layers are: no run
# finds its keys in the CPU's caches.
CACHE_BYTES_IN_TURN = 128 << 20


@dataclass(frozen=True)
class Shape:
    """Extents of one attention problem; query i stands at kv_len - q_len + i."""

    batch: int
    num_heads: int
    num_kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    value_dim: int

    @staticmethod
    def parse(text: str) -> Shape:
        """From "B,H,HKV,LQ,LKV,D[,DV]"; ValueError says what is wrong."""
        try:
            numbers = [int(part) for part in text.split(",")]
        except ValueError:
            raise ValueError(f"shape {text} is not a list of integers") from None
        if len(numbers) not in (6, 7):
            raise ValueError(f"shape {text} has {len(numbers)} extents, not B,H,HKV,LQ,LKV,D[,DV]")
        if min(numbers) < 1:
            raise ValueError(f"shape {text} has an extent below 1")
        shape = Shape(*numbers[:6], numbers[-1] if len(numbers) == 7 else numbers[5])
        if shape.num_heads % shape.num_kv_heads:
            raise ValueError(f"{shape.num_kv_heads} KV heads do not divide {shape.num_heads} heads")
        return shape

    def __str__(self) -> str:
        extents = list(asdict(self).values())
        return ",".join(map(str, extents[:6] if self.value_dim == self.head_dim else extents))

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    def visible_pairs(self, causal: bool) -> float:
        """Query-key pairs of all heads that the work is counted by: half of them when causal.

        With fewer queries than keys, the queries being the last keys, only the last square is
        halved.
        """
        hidden = min(self.q_len, self.kv_len) / 2 if causal and self.q_len > 1 else 0
        return self.batch * self.num_heads * self.q_len * (self.kv_len - hidden)

    def flops(self, causal: bool) -> float:
        return 2.0 * self.visible_pairs(causal) * (self.head_dim + self.value_dim)

    def cache_bytes(self, dtype: str) -> int:
        """Of keys and values, each once."""
        tokens = self.batch * self.num_kv_heads * self.kv_len
        return tokens * (self.head_dim + self.value_dim) * ITEM_BYTES[dtype]


P1 = Shape(1, 32, 8, 2048, 2048, 128, 128)
P2 = Shape(1, 16, 16, 4096, 4096, 64, 64)
P3 = Shape(8, 12, 12, 197, 197, 64, 64)
D1 = Shape(1, 32, 32, 1, 4096, 128, 128)
D2 = Shape(1, 32, 8, 1, 16384, 128, 128)
D3 = Shape(16, 32, 8, 1, 2048, 128, 128)
SPARSE = Shape(1, 8, 8, 32768, 32768, 128, 128)


SPARSE_SWEEP = Shape(1, 8, 8, 16384, 16384, 128, 128)
SPARSE_FACTORS = (0.5, 0.75, 0.9, 0.95)


def square(length: int) -> Shape:
    return Shape(1, 8, 8, length, length, 128, 128)


def decode(length: int) -> Shape:
    return Shape(1, 32, 8, 1, length, 128, 128)


@dataclass(frozen=True)
class Contender:
    """One system on one problem. `implementation` and `options` are ours alone."""

    system: str
    dtype: str
    implementation: str = ""
    cache_dtype: str = ""  # decode: of the cache
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def label(self) -> str:
        parts = [self.system, self.implementation]
        if self.system == "attnd":
            parts.append(self.cache_dtype or self.dtype)
            parts += [f"{name}={value}" for name, value in self.options.items()]
        return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class Row:
    """One row of the table: ours on a problem, and whom it is measured beside."""

    bench: str  # "prefill", "decode", "sparse", "sweep", "workspace"
    name: str  # "P1", or the extents
    shape: Shape
    causal: bool
    subject: Contender
    peers: tuple[Contender, ...] = ()
    own: tuple[Contender, ...] = ()  # of ours too: ratios that are not those of peers
    data: str = "gaussian"  # or "long_document"
    repeats: int = 0  # 0: as the command says
    once: bool = False  # one execution of ours tells what is asked: memory

    @property
    def cached(self) -> bool:
        return bool(self.subject.cache_dtype)

    @property
    def title(self) -> str:
        order = "" if self.cached else "causal" if self.causal else "not causal"
        dtype = self.subject.cache_dtype or self.subject.dtype
        which = self.subject.implementation if self.bench in ("sweep", "workspace") else ""
        options = " ".join(f"{name}={value}" for name, value in self.subject.options.items())
        return " ".join(p for p in (self.bench, self.name, order, dtype, which, options) if p)

    def limit(self) -> str:
        """What bounds it: reads out of memory for decoding, arithmetic otherwise."""
        return "read" if self.cached else self.subject.dtype

    def work(self) -> float:
        """Operations, or bytes of keys and values, of one execution."""
        if self.cached:
            return float(self.shape.cache_bytes(self.subject.cache_dtype))
        return self.shape.flops(self.causal)


def problem_of(row: Row, contender: Contender) -> dict[str, Any]:
    """What a worker needs to know to prepare the contender's side of a row, but for the inputs."""
    problem: dict[str, Any] = asdict(row.shape)
    problem.update(
        is_causal=row.causal and row.shape.q_len > 1,
        dtype=contender.dtype,
        cached=row.cached,
        cache_dtype=contender.cache_dtype if row.cached else "",
    )
    problem["cache_copies"] = 1
    if row.cached:
        held = row.shape.cache_bytes(contender.cache_dtype or contender.dtype)
        problem["cache_copies"] = min(8, -(-CACHE_BYTES_IN_TURN // held))
    return problem


@dataclass(frozen=True)
class Choice:
    """What of the table is asked for."""

    implementation: str  # of ours, for exact attention
    peers: tuple[str, ...]
    memory: dict[str, str]  # of our implementations: how their workspace grows


def _row(choice: Choice, bench: str, name: str, shape: Shape, causal: bool, dtype: str) -> Row:
    cache = dtype if bench == "decode" else ""
    return Row(
        bench,
        name,
        shape,
        causal,
        Contender("attnd", dtype, choice.implementation, cache),
        tuple(Contender(peer, dtype, cache_dtype=cache) for peer in choice.peers),
    )


def table_rows(choice: Choice) -> list[Row]:
    """The rows of the table of figures."""
    rows = []
    for dtype in DTYPES:
        for name, shape, causal in (("P1", P1, True), ("P1", P1, False), ("P2", P2, True)):
            row = _row(choice, "prefill", name, shape, causal, dtype)
            if dtype == "float16":
                own = replace(row.subject, dtype="float32")
                row = replace(row, own=(own,))
            rows.append(row)
    rows += [_row(choice, "prefill", "P3", P3, False, dtype) for dtype in ("float32", "bfloat16")]
    for dtype in DTYPES:
        for name, shape in (("D1", D1), ("D2", D2), ("D3", D3)):
            rows.append(_row(choice, "decode", name, shape, False, dtype))
    bf16 = Contender("attnd", "bfloat16", choice.implementation, "bfloat16")
    int8 = replace(bf16, cache_dtype="int8")
    rows.append(Row("decode", "D2", D2, False, int8, own=(bf16,)))
    rows.append(sparse_row(choice, "S", SPARSE, 0.9))
    rows += [
        sparse_row(choice, f"n={SPARSE_SWEEP.q_len}", SPARSE_SWEEP, factor)
        for factor in SPARSE_FACTORS
    ]
    return rows


def sparse_row(choice: Choice, name: str, shape: Shape, factor: float) -> Row:
    """Sparse prefill against our exact one, on data with the structure of long documents."""
    return Row(
        "sparse",
        name,
        shape,
        True,
        Contender("attnd", "bfloat16", "sparse", options={"factor": factor}),
        own=(Contender("attnd", "bfloat16", choice.implementation),),
        data="long_document",
        repeats=3,
    )


# Lengths that the plots of time and memory have; without the last ones where memory is O(n^2).
SWEEP_LENGTHS = (512, 1024, 2048, 4096, 8192)
LONG_LENGTHS = (16384,)
WORKSPACE_LENGTHS = (32768, 65536)


def sweep_rows(choice: Choice) -> list[Row]:
    """Time and memory over the length, of each implementation of ours and of torch."""
    rows = []
    for name, memory in choice.memory.items():
        lengths = SWEEP_LENGTHS + (() if "n^2" in memory else LONG_LENGTHS)
        options = {"factor": 0.9} if name == "sparse" else {}
        for length in lengths:
            peers = ("torch",) if name == choice.implementation else ()
            rows.append(
                Row(
                    "sweep",
                    f"n={length}",
                    square(length),
                    True,
                    Contender("attnd", "bfloat16", name, options=options),
                    tuple(Contender(p, "bfloat16") for p in peers if p in choice.peers),
                    repeats=3,
                )
            )
    return rows


def workspace_rows(choice: Choice) -> list[Row]:
    """Scratch memory on long sequences, of the implementations that promise little of it."""
    rows = []
    for name in ("flash", "memory_efficient"):
        if name not in choice.memory:
            continue
        for length in WORKSPACE_LENGTHS:
            for shape, cache in ((decode(length), "bfloat16"), (square(length), "")):
                subject = Contender("attnd", "bfloat16", name, cache)
                title = f"{'decode' if cache else 'prefill'} n={length}"
                rows.append(Row("workspace", title, shape, not cache, subject, once=True))
    return rows


def custom_row(choice: Choice, shape: Shape, causal: bool, dtype: str) -> Row:
    """A shape of the caller's own: decoding from a cache where there is one query."""
    bench = "decode" if shape.q_len == 1 else "prefill"
    return _row(choice, bench, str(shape), shape, causal, dtype)


def quick_rows(rows: list[Row]) -> list[Row]:
    """The same rows on shapes that take milliseconds."""

    def smaller(shape: Shape) -> Shape:
        def cut(length: int) -> int:
            return length if length == 1 else min(length, 256 if shape.q_len > 1 else 1024)

        return replace(
            shape,
            batch=min(shape.batch, 2),
            num_heads=max(shape.num_heads // 4, shape.group),
            num_kv_heads=max(shape.num_heads // 4, shape.group) // shape.group,
            q_len=cut(shape.q_len),
            kv_len=cut(shape.kv_len),
        )

    return [replace(row, shape=smaller(row.shape), repeats=0) for row in rows]

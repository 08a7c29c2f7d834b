"""What the compiled CPU target is measured on: for each workload its data, its contestants and what is asked of them.

Rivals are given their best form. Inductor writes straight into a given output where a function ends in ``copy_``, with
one exception: it builds a concatenation first and copies that. Rotary embedding is therefore also written without one,
as the pairs and the swapped pairs, which Inductor makes one loop of.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

import tilewright
from tilewright.optional import require

if TYPE_CHECKING:
    from collections.abc import Callable

COLUMNS = 4096
HEADS, HEAD_DIM = 32, 128
ATTENTION_HEADS, ATTENTION_DIM = 8, 64
INTERPRETER = "interpreter"
DTYPES = (torch.float32, torch.bfloat16)
DOT_TILES = ((1, 64, 64, 64), (1, 128, 128, 64), (4, 64, 64, 32))
"""Batch, m, n, k of the tiles that ``tl.dot`` is measured on, many in a row."""


@dataclass(frozen=True)
class Contestant:
    """One way to compute a workload's result.

    Attributes:
        call: computes it.
        out: what ``call`` writes into; None if it returns a tensor of its own.
        judged: whether the result is comparable with the others'.
    """

    call: Callable[[], Any]
    out: torch.Tensor | None = None
    judged: bool = True

    def result(self) -> torch.Tensor:
        """Run it once; an element that it does not write is NaN."""
        if self.out is not None:
            self.out.fill_(torch.nan)
        returned: torch.Tensor = self.call()
        return returned if self.out is None else self.out


@dataclass(frozen=True)
class Contest:
    """A workload with its data.

    Attributes:
        contestants: by name.
        definition: the result by plain torch, computed in a dtype.
        reduced: how many products each element of the result sums.
        result_dtype: dtype of the result; that of the workload if None.
    """

    contestants: dict[str, Contestant]
    definition: Callable[[torch.dtype], torch.Tensor]
    reduced: int = 1
    result_dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Claim:
    """Ours against a rival: rival's time over our time, and the least that it shall be, if anything is claimed."""

    ours: str
    rival: str
    least: float | None = None


@dataclass(frozen=True)
class Workload:
    """What is computed.

    Attributes:
        name: of the workload.
        dtype: of its tensors.
        build: makes the data and the contestants for a number of rows, tokens or heads.
        size: how many.
        claims: which times are compared.
        interpreted: how many the interpreter is given; 0 if it is left out.
    """

    name: str
    dtype: torch.dtype
    build: Callable[[int, torch.dtype], Contest]
    size: int
    claims: tuple[Claim, ...]
    interpreted: int = 0


BY_ROWS = (
    Claim("triton out", "torch.compile out", 1.0),
    Claim("triton", "torch.compile", 0.95),
    Claim("triton", "torch"),
    Claim("triton out", INTERPRETER, 600.0),
)
OF_SOFTMAX = (*BY_ROWS, Claim("triton out", "torch out"))
OF_ROPE = (*BY_ROWS, Claim("triton", "torch.compile cat", 0.95))  # whichever is faster
OF_ATTENTION = (Claim("triton", "torch", 1.0), Claim("triton", INTERPRETER, 600.0))
OF_MATMUL = (Claim("triton out", "torch out", 0.5), Claim("triton wrapped out", "torch out"))
OF_DOT = (Claim("triton out", "torch out", 0.3),)


def workloads(quick: bool) -> list[Workload]:
    """Everything that contestants are measured on, by name and dtype."""
    module = kernels()
    found = []
    for dtype in DTYPES:
        part = dtype == torch.float32  # the interpreter is measured in float32
        add = partial(Workload, dtype=dtype)
        rows: dict[str, Any] = {"size": COLUMNS, "claims": BY_ROWS, "interpreted": 64 * part}
        found.append(add(f"rms_norm {COLUMNS}x{COLUMNS}", build=partial(_rms_norm, module), **rows))
        found.append(
            add(f"softmax {COLUMNS}x{COLUMNS}", build=partial(_softmax, module), **rows | {"claims": OF_SOFTMAX})
        )
        found.append(
            add(f"rope {COLUMNS}x{HEADS}x{HEAD_DIM}", build=partial(_rope, module), **rows | {"claims": OF_ROPE})
        )
        for length in (512,) if quick else (512, 2048):
            name = f"causal attention {ATTENTION_HEADS}x{length}x{ATTENTION_DIM}"
            build = partial(_attention, module, length)
            found.append(add(name, build=build, size=ATTENTION_HEADS, claims=OF_ATTENTION, interpreted=int(part)))
        found.append(add("matmul 1024^3", build=partial(_matmul, module), size=1024, claims=OF_MATMUL))
        for tile in DOT_TILES:
            name = f"dot {'x'.join(map(str, tile[tile[0] == 1 :]))}"
            found.append(add(name, build=partial(_dot_tiles, module, tile), size=256, claims=OF_DOT))
    return [
        workload if workload.interpreted else replace(workload, claims=_without_interpreter(workload.claims))
        for workload in found
    ]


def _without_interpreter(claims: tuple[Claim, ...]) -> tuple[Claim, ...]:
    return tuple(claim for claim in claims if claim.rival != INTERPRETER)


def kernels() -> Any:
    """The module of kernels.

    Raises:
        MissingDependencyError: Triton is missing or broken.
    """
    require("triton", "tilewright bench cpu")
    from tilewright.bench import cpu_kernels

    return cpu_kernels


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Normally distributed numbers, the same ones each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=False)


def _rms_norm(kernels: Any, rows: int, dtype: torch.dtype) -> Contest:
    x, weight = random(rows, COLUMNS, dtype=dtype), random(COLUMNS, dtype=dtype, seed=1)
    out, their_out = torch.empty_like(x), torch.empty_like(x)

    def normalise(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, (COLUMNS,), weight, 1e-6)

    def into(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(normalise(x, weight))

    compiled, compiled_into = _compiled(normalise), _compiled(into)
    return Contest(
        {
            "triton out": Contestant(lambda: kernels.rms_norm(x, weight, out=out), out),
            "triton": Contestant(lambda: kernels.rms_norm(x, weight)),
            "torch.compile out": Contestant(lambda: compiled_into(x, weight, their_out), their_out),
            "torch.compile": Contestant(lambda: compiled(x, weight)),
            "torch": Contestant(lambda: normalise(x, weight)),
        },
        lambda kind: normalise(x.to(kind), weight.to(kind)),
    )


def _softmax(kernels: Any, rows: int, dtype: torch.dtype) -> Contest:
    x = random(rows, COLUMNS, dtype=dtype)
    out, their_out, eager_out = (torch.empty_like(x) for _ in range(3))

    def into(x: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(torch.softmax(x, -1))

    compiled, compiled_into = _compiled(partial(torch.softmax, dim=-1)), _compiled(into)
    return Contest(
        {
            "triton out": Contestant(lambda: kernels.softmax(x, out=out), out),
            "triton": Contestant(lambda: kernels.softmax(x)),
            "torch.compile out": Contestant(lambda: compiled_into(x, their_out), their_out),
            "torch.compile": Contestant(lambda: compiled(x)),
            "torch out": Contestant(lambda: torch.softmax(x, -1, out=eager_out), eager_out),
            "torch": Contestant(lambda: torch.softmax(x, -1)),
        },
        lambda kind: torch.softmax(x.to(kind), -1),
    )


def _rope(kernels: Any, tokens: int, dtype: torch.dtype) -> Contest:
    x = random(tokens, HEADS, HEAD_DIM, dtype=dtype)
    cos, sin = tilewright.rope_table(HEAD_DIM, tokens)
    out, their_out = torch.empty_like(x), torch.empty_like(x)
    sign = torch.tensor([[-1.0], [1.0]])  # of the sine, for either half

    def rotate(x: torch.Tensor) -> torch.Tensor:
        x1, x2 = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
        return torch.cat((x1 * cos[:, None] - x2 * sin[:, None], x2 * cos[:, None] + x1 * sin[:, None]), -1).to(x.dtype)

    def rotate_swapped(x: torch.Tensor) -> torch.Tensor:
        pairs = x.float().view(tokens, HEADS, 2, HEAD_DIM // 2)
        y = pairs * cos[:, None, None] + pairs.flip(-2) * (sin[:, None, None] * sign)
        return y.view(x.shape).to(x.dtype)

    def into(x: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(rotate_swapped(x))

    compiled, compiled_swapped, compiled_into = _compiled(rotate), _compiled(rotate_swapped), _compiled(into)
    return Contest(
        {
            "triton out": Contestant(lambda: kernels.rope(x, cos, sin, out=out), out),
            "triton": Contestant(lambda: kernels.rope(x, cos, sin)),
            "torch.compile out": Contestant(lambda: compiled_into(x, their_out), their_out),
            "torch.compile": Contestant(lambda: compiled_swapped(x)),
            "torch.compile cat": Contestant(lambda: compiled(x)),
            "torch": Contestant(lambda: rotate(x)),
        },
        lambda kind: rotate(x.to(kind)),
    )


def _attention(kernels: Any, length: int, heads: int, dtype: torch.dtype) -> Contest:
    q, k, v = (random(1, heads, length, ATTENTION_DIM, dtype=dtype, seed=seed) for seed in range(3))

    def attend(kind: torch.dtype) -> torch.Tensor:
        return functional.scaled_dot_product_attention(q.to(kind), k.to(kind), v.to(kind), is_causal=True)

    return Contest(
        {
            "triton": Contestant(lambda: kernels.attention(q, k, v).out),
            "torch": Contestant(lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True)),
        },
        attend,
        reduced=length,
    )


def _matmul(kernels: Any, size: int, dtype: torch.dtype) -> Contest:
    a, b = random(size, size, dtype=dtype), random(size, size, dtype=dtype, seed=1)
    out, wrapped_out, their_out = (torch.empty_like(a) for _ in range(3))
    return Contest(
        {
            "triton out": Contestant(lambda: kernels.matmul(a, b, out=out), out),
            "triton wrapped out": Contestant(lambda: kernels.matmul(a, b, wrap=True, out=wrapped_out), wrapped_out),
            "torch out": Contestant(lambda: torch.mm(a, b, out=their_out), their_out),
        },
        lambda kind: torch.mm(a.to(kind), b.to(kind)),
        reduced=size,
    )


def _dot_tiles(kernels: Any, tile: tuple[int, int, int, int], n_tiles: int, dtype: torch.dtype) -> Contest:
    """Products of tiles: ours adds up those of a program, torch's batched product stores each and adds none."""
    (batch, m, n, k), programs = tile, min(16, n_tiles)
    shape = (n_tiles, batch) if batch > 1 else (n_tiles,)
    a, b = random(*shape, m, k, dtype=dtype), random(*shape, k, n, dtype=dtype, seed=1)
    out = torch.empty(programs, *shape[1:], m, n)
    a_tiles, b_tiles, products = a.view(-1, m, k), b.view(-1, k, n), a.new_empty(n_tiles * batch, m, n)
    return Contest(
        {
            "triton out": Contestant(lambda: kernels.dot_tiles(a, b, programs, out=out), out),
            "torch out": Contestant(lambda: torch.bmm(a_tiles, b_tiles, out=products), products, judged=False),
        },
        lambda kind: (a.to(kind) @ b.to(kind)).view(programs, -1, *out.shape[1:]).sum(1),
        reduced=n_tiles // programs * k,
        result_dtype=torch.float32,
    )

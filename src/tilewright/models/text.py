"""The text that the demo learns from, as bytes, and the batches drawn from it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

import torch

from tilewright.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterator

WORKS = ("alice_in_wonderland", "as_you_like_it")
"""The works that the package ships; ``data/README.md`` says where they come from."""

VALIDATION_SHARE = 0.1
"""The last part of each work, which no training sees."""


@dataclass(frozen=True)
class Corpus:
    """A text in two parts.

    Attributes:
        name: for people.
        train: what is learnt from, [n_train] uint8 on the CPU.
        validation: what is only read, [n_validation] uint8 on the CPU.
    """

    name: str
    train: torch.Tensor
    validation: torch.Tensor


def read_work(name: str) -> bytes:
    """The bytes of one shipped work.

    Raises:
        ArgumentError: there is no such work.
    """
    if name not in WORKS:
        raise ArgumentError("read_work", "name", f"got {name!r}, expected one of {', '.join(WORKS)}")
    return (resources.files("tilewright.models") / "data" / f"{name}.txt").read_bytes()


def load_corpus(works: tuple[str, ...] = WORKS) -> Corpus:
    r"""The shipped works as tensors. Each gives its last tenth to the validation part: both parts know each style.

    Raises:
        ArgumentError: there is no such work.

    Example:
        >>> corpus = load_corpus(("alice_in_wonderland",))
        >>> decode(corpus.validation[-8:])
        'THE END\n'
    """
    train, validation = [], []
    for work in works:
        data = encode(read_work(work))
        n_train = round(len(data) * (1 - VALIDATION_SHARE))
        train.append(data[:n_train])
        validation.append(data[n_train:])
    return Corpus(", ".join(works), torch.cat(train), torch.cat(validation))


def encode(text: bytes) -> torch.Tensor:
    """Bytes as a tensor: [len(text)] uint8 on the CPU."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)


def decode(data: torch.Tensor) -> str:
    """Bytes as a string to show: what is no printable ASCII character, tab or line end becomes a replacement character.

    Args:
        data: [n], any integer dtype, values 0 to 255.
    """
    return "".join(chr(byte) if 32 <= byte < 127 or byte in b"\n\t" else "\ufffd" for byte in data.tolist())


def batches(
    data: torch.Tensor, *, steps: int, batch: int, context: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Random windows of a text with the bytes that follow. The same arguments give the same batches, always.

    Args:
        data: the text, [n] uint8.
        steps: how many batches.
        batch: windows in a batch.
        context: bytes in a window.
        seed: picks the windows.

    Yields:
        inputs and targets, each [batch, context] int64 on the CPU; targets are the inputs moved on by one byte.

    Raises:
        ArgumentError: the text is shorter than one window and its next byte.
    """
    if len(data) <= context:
        raise ArgumentError("batches", "data", f"has {len(data)} bytes; a window of {context} needs {context + 1}")
    generator = torch.Generator().manual_seed(seed)
    window = torch.arange(context + 1)
    for _ in range(steps):
        first = torch.randint(len(data) - context, (batch, 1), generator=generator)
        picked = data[first + window].long()
        yield picked[:, :-1], picked[:, 1:]


def windows(data: torch.Tensor, *, batch: int, context: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A text from its beginning in windows that lie side by side; what is left at its end is not read.

    Yields:
        inputs and targets as :func:`batches` does; the last batch may have fewer windows.
    """
    n_windows = (len(data) - 1) // context
    inputs = data[: n_windows * context].view(n_windows, context)
    targets = data[1 : n_windows * context + 1].view(n_windows, context)
    for first in range(0, n_windows, batch):
        yield inputs[first : first + batch].long(), targets[first : first + batch].long()

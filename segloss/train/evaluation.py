"""Held-out evaluation: loss, exact match of greedy answers, and what guessing would score."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import segloss
from segloss.integrations.window import next_tokens

from .data import Encoded, TaskData, prompt_batch, training_batch
from .forward import autocast, logits_of, token_sums
from .tasks import Example

# tokens that an answer may run over the longest expected one, so that the end is seen to be one
SLACK_TOKENS = 4


@dataclass(frozen=True)
class Evaluation:
    """One task's held-out result."""

    loss: float
    """Mean cross-entropy per completion token (end of text included), in nats."""
    correct: list[bool]
    """Exact match of each held-out item, in the order of the split."""
    answers: list[str]
    """What was generated."""
    token_accuracy: float = float("nan")
    """Share of the completion tokens that are the most probable one, given the true ones before."""
    entropy: float = float("nan")
    """Mean entropy of the prediction of a completion token, in nats."""

    @property
    def exact_match(self) -> float:
        return sum(self.correct) / len(self.correct)

    @property
    def scores(self) -> dict[str, float]:
        """What metrics.jsonl says of it."""
        return {
            "loss": self.loss,
            "exact_match": self.exact_match,
            "token_accuracy": self.token_accuracy,
            "entropy": self.entropy,
        }


class Evaluator:
    """Evaluates a model on held-out items.

    Args:
        tokenizer: decodes the answers; its padding token fills the batches.
        batch_size: items in one forward pass.
        dtype: the arithmetic of the forward pass, None for that of the weights.
        head: "fused" or "logits", as for training.
    """

    def __init__(
        self,
        tokenizer,
        batch_size: int,
        dtype: torch.dtype | None = None,
        head: str = "fused",
    ):
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.dtype = dtype
        self.head = head

    @torch.no_grad()
    def __call__(self, model, task: TaskData, progress=lambda items: None) -> Evaluation:
        """Loss and greedy answers of one task; `progress` is called with each batch's size."""
        was_training = model.training
        model.eval()
        sums = torch.zeros(4, dtype=torch.float64)
        answers = [""] * len(task.held_out)
        limit = max(len(item.completion_ids) for item in task.held_out) + SLACK_TOKENS
        for indices, items in self._batches(task.held_out):
            sums += self._sums(model, items)
            for index, answer in zip(indices, self._answers(model, items, limit), strict=True):
                answers[index] = answer
            progress(len(items))
        model.train(was_training)
        correct = [
            exact_match(answer, item.example.completion)
            for answer, item in zip(answers, task.held_out, strict=True)
        ]
        loss, accuracy, entropy = (sums[:3] / sums[3]).tolist()
        return Evaluation(loss, correct, answers, accuracy, entropy)

    @torch.no_grad()
    def loss(self, model, items: Sequence[Encoded]) -> float:
        """Mean cross-entropy per completion token of some items, without generating."""
        was_training = model.training
        model.eval()
        sums = torch.stack([self._sums(model, batch) for _, batch in self._batches(items)]).sum(0)
        model.train(was_training)
        return (sums[0] / sums[3]).item()

    def _batches(self, items: Sequence[Encoded]) -> Iterator[tuple[list[int], list[Encoded]]]:
        """Items of similar length together: less padding."""
        order = sorted(range(len(items)), key=lambda index: len(items[index].prompt_ids))
        for start in range(0, len(order), self.batch_size):
            indices = order[start : start + self.batch_size]
            yield indices, [items[index] for index in indices]

    def _sums(self, model, items: list[Encoded]) -> Tensor:
        """(4,) of the completion tokens: cross-entropy, hits, entropy, and how many they are."""
        batch = self._to(model, training_batch(items, self.tokenizer.pad_token_id))
        target = next_tokens(batch.pop("labels"))
        logits: Any = logits_of(model, batch, self.head, self.dtype)
        statistics = segloss.logit_statistics(logits, target, entropy=True, argmax=True)
        return token_sums(statistics, target).sum((0, 1)).cpu()

    def _answers(self, model, items: list[Encoded], limit: int) -> list[str]:
        batch = self._to(model, prompt_batch(items, self.tokenizer.pad_token_id))
        with autocast(model.device, self.dtype):
            output = model.generate(
                **batch,
                max_new_tokens=limit,
                do_sample=False,
                num_beams=1,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        new_tokens = output[:, batch["input_ids"].shape[1] :]
        return self.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)

    @staticmethod
    def _to(model, batch: dict) -> dict:
        return {key: value.to(model.device) for key, value in batch.items()}


# -------------------------------------------------------------------------------- exact match


def normalise(text: str) -> str:
    """Case folded, white space collapsed, surrounding quotes and punctuation removed.

    >>> normalise('  "48  Points." ')
    '48 points'
    """
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'`*")


def exact_match(answer: str, completion: str) -> bool:
    """Whether the generated answer is the completion, both normalised.

    Of the answer only as many lines count as the completion has (one, mostly): a model that goes on
    after a right answer has still answered.
    """
    lines = completion.strip().splitlines()
    answered = answer.strip().splitlines()[: len(lines)]
    return [normalise(line) for line in answered] == [normalise(line) for line in lines]


# ----------------------------------------------------------------------- what guessing scores


def chance(examples: Sequence[Example]) -> float | None:
    """Expected exact match of a uniform guess among the options; None where an item has none."""
    if not all(example.options for example in examples):
        return None
    return float(np.mean([1 / len(example.options) for example in examples]))


def majority(train: Sequence[Example], held_out: Sequence[Example]) -> tuple[str, float]:
    """The training part's most frequent answer, and its exact match on the held-out part."""
    counts = Counter(normalise(example.completion) for example in train)
    answer = min(counts, key=lambda text: (-counts[text], text))
    hits = [normalise(example.completion) == answer for example in held_out]
    return answer, float(np.mean(hits))


def bootstrap_interval(
    before: Sequence[bool],
    after: Sequence[bool],
    *,
    seed: int = 0,
    resamples: int = 10_000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of `mean(after) - mean(before)`, items resampled in pairs."""
    gain = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)
    rng = np.random.default_rng(seed)
    means = gain[rng.integers(len(gain), size=(resamples, len(gain)))].mean(axis=1)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)

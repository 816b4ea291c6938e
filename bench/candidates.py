"""Lovász's candidates while a real model learns: `python -m bench.candidates`.

SmolLM2-135M is fine-tuned on the built-in tasks with 0.6 CE + 0.4 Lovász, on prompts and answers
alike, and every step's candidates are counted where they are made. The few examples are seen again
and again, so that training passes from the model as it comes to one that knows its data by heart:
a token with p = 1 makes all rows of its class candidates.

N tokens of a step, K classes present, M candidates.
"""

from __future__ import annotations

import contextlib
import io
import random
import sys
import time
from collections.abc import Sequence

import torch

import segloss
from bench.common import Report, Section, options
from segloss.sweep import dense

TASKS = ("asdiv", "siqa")
LOSS = 0.6 * segloss.CrossEntropyLoss() + 0.4 * segloss.LovaszSoftmaxLoss()
BATCH, LENGTH = 8, 96


class Counter:
    """Stands in for `kernels.candidates`, and remembers (N, K, M) of each call."""

    def __init__(self, found):
        self.found = found
        self.calls: list[tuple[int, int, int]] = []

    def __call__(self, rows, row_max, log_sum, columns, sample, own, threshold):
        result = self.found(rows, row_max, log_sum, columns, sample, own, threshold)
        self.calls.append((int((sample >= 0).sum()), columns.numel(), result[0].numel()))
        return result


def batches(tokenizer, examples: int, generator: random.Random):
    """Endless (input_ids, attention_mask, target) of `BATCH` examples, shuffled every epoch."""
    from bench.tasks import examples as read

    texts = []
    for task in TASKS:
        texts += [prompt + answer for prompt, answer in read(task)[: examples // 2]]
    rows = [[*tokenizer(text)["input_ids"][:LENGTH], tokenizer.eos_token_id] for text in texts]
    while True:
        generator.shuffle(rows)
        for start in range(0, len(rows) - BATCH + 1, BATCH):
            batch = rows[start : start + BATCH]
            width = max(map(len, batch))
            ids = torch.tensor([row + [0] * (width - len(row)) for row in batch])
            mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in batch])
            target = ids.masked_fill(mask == 0, -100).roll(-1, 1)
            target[:, -1] = -100
            yield ids, mask, target


def train(steps: int, examples: int, rate: float) -> dict[str, list[float]]:
    """Per step: tokens, classes, candidates, the mean p of the targets, the share with p = 1."""
    from segloss.train import model as models

    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        network, tokenizer = models.load("smollm2")
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.0)
    torch.manual_seed(0)
    counter = Counter(dense.candidates)
    found: dict[str, list[float]] = {
        name: [] for name in ("tokens", "classes", "candidates", "p", "saturated", "loss")
    }
    data = batches(tokenizer, examples, random.Random(0))
    start = time.monotonic()
    for step in range(steps):
        ids, mask, target = next(data)
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(input_ids=ids, attention_mask=mask, use_cache=False).logits
        # on logits that exist: one call a step, whatever the fused head's chunks
        original, dense.candidates = dense.candidates, counter
        try:
            loss, stats = LOSS(logits, target, return_statistics=True)
        finally:
            dense.candidates = original
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        p = stats.log_prob[stats.valid].exp()
        values = (*counter.calls[-1], p.mean().item(), (p == 1).float().mean().item(), loss.item())
        for series, value in zip(found.values(), values, strict=True):
            series.append(value)
        if step % 10 == 0 or step == steps - 1:
            tokens, classes, number, mean, saturated, _ = values
            print(
                f"step {step}: {number / tokens:.2f} candidates a token of {classes} classes, "
                f"p {mean:.2f}, p = 1 at {saturated:.1%}, {time.monotonic() - start:.0f} s",
                flush=True,
            )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = options("candidates", "Count Lovász's candidates during a real training run.", 1)
    parser.add_argument("--steps", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--examples", type=int, default=48, help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=2e-4, help="default: %(default)s")
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.steps = 2
    report = Report("Candidates of Lovász-Softmax during training", chosen)
    found = train(chosen.steps, chosen.examples, chosen.lr)
    epoch = chosen.examples // BATCH
    facts = {
        "run": f"SmolLM2-135M, {' and '.join(TASKS)}, 0.6 CE + 0.4 Lovász, AdamW at {chosen.lr:g}, "
        f"{chosen.steps} steps of {BATCH} examples, {epoch} steps an epoch",
    }
    title = f"candidates of Lovász during {chosen.steps} steps of fine-tuning"
    report.add(Section(title, "candidates", {}, facts=facts, data=found))
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())

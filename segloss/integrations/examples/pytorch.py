"""A plain PyTorch loop with accumulation: `python -m segloss.integrations.examples.pytorch`.

A tiny random model learns to continue its own sequences; nothing is downloaded. B sequences of T
tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import segloss

V = 211


class TinyModel(nn.Module):
    """Hidden states (B, T, D) of tokens (B, T), and a head that the loss multiplies by."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.embed = nn.Embedding(V, width)
        self.mix = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, V, bias=False)

    def forward(self, tokens: Tensor) -> segloss.LinearLogits:
        hidden, _ = self.mix(self.embed(tokens))
        return segloss.LinearLogits(hidden, self.head.weight)


def next_tokens(tokens: Tensor, prompt: Tensor) -> Tensor:
    """(B, T) targets; the prompt's tokens (B,) are not predicted."""
    target = tokens.roll(-1, 1)
    target[:, -1] = -100
    return target.masked_fill(torch.arange(1, tokens.shape[1] + 1) < prompt[:, None], -100)


def sequences(count: int) -> tuple[Tensor, Tensor]:
    """Rising sequences (B, T), and how many of their tokens are prompt (B,)."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(V, (count, 1), generator=generator)
    prompt = torch.randint(1, 12, (count,), generator=generator)
    return (start + 3 * torch.arange(16)) % V, prompt


def accumulate(model: nn.Module, criterion, batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Gradients of one step over micro-batches (tokens, target); returns its loss.

    Every micro-batch is divided by the tokens of all: for a token loss, the gradient of one batch.
    """
    num_tokens = sum((target != -100).sum() for _, target in batches)
    total = torch.zeros(())
    for tokens, target in batches:
        loss = criterion(model(tokens), target, normalizer=num_tokens)
        loss.backward()
        total = total + loss.detach()
    return total


def main(steps: int = 30, accumulation: int = 4) -> list[float]:
    torch.manual_seed(0)
    model = TinyModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    criterion = 0.6 * segloss.CrossEntropyLoss() + 0.4 * segloss.FocalLoss()
    tokens, prompt = sequences(32)
    target = next_tokens(tokens, prompt)
    batches = list(zip(tokens.chunk(accumulation), target.chunk(accumulation), strict=True))
    losses = []
    for _ in range(steps):
        losses.append(accumulate(model, criterion, batches).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps")

"""`python -m bench.gradex [--quick]`: GradEx's estimates against retraining, on noisy addition.

A small transformer that has begun to learn addition is fine-tuned on groups of sums, of which some
have random answers. How much cross-entropy on clean sums does fine-tuning on a subset of the groups
leave? Retraining says so, and GradEx estimates it from gradients at one set of weights.

Steps: base model (clean sums), meta-training (all groups), gradients once, then for every subset an
estimate and a retraining from the base model, with as many steps each as meta-training.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

import segloss
from bench.common import Line, Report, Section, options
from segloss.selection import Comparison, GradEx, Sample

VOCABULARY = "0123456789+="
IGNORE = -100


@dataclass(frozen=True)
class Toy:
    """Sizes; the defaults are those of the full measurement."""

    digits: int = 3
    width: int = 128
    layers: int = 2
    base_steps: int = 1500
    base_sums: int = 4000
    steps: int = 300
    batch: int = 64
    lr: float = 5e-4
    clean_groups: int = 12
    noisy_groups: int = 8
    group_size: int = 25
    held_out: int = 200
    subsets: int = 16
    dim: int = 400
    seed: int = 0

    @property
    def groups(self) -> list[str]:
        clean = [f"clean{i}" for i in range(self.clean_groups)]
        return clean + [f"noisy{i}" for i in range(self.noisy_groups)]


class Adder(nn.Module):
    """A causal transformer on the characters of sums."""

    def __init__(self, toy: Toy):
        super().__init__()
        self.token = nn.Embedding(len(VOCABULARY), toy.width)
        self.position = nn.Embedding(3 * toy.digits + 3, toy.width)
        layer = nn.TransformerEncoderLayer(
            toy.width, 4, 4 * toy.width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, toy.layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(toy.width)
        self.head = nn.Linear(toy.width, len(VOCABULARY), bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (B, T, V) of ids (B, T)."""
        length = ids.shape[1]
        hidden = self.token(ids) + self.position.weight[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        return self.head(self.norm(self.blocks(hidden, mask, is_causal=True)))


def sums(toy: Toy, count: int, rng: random.Random, noisy: bool = False) -> Tensor:
    """`count` sums as ids (count, T), the answer's digits in reverse: carries come first."""
    rows = []
    for _ in range(count):
        a, b = (rng.randrange(10**toy.digits) for _ in range(2))
        answer = rng.randrange(2 * 10**toy.digits - 1) if noisy else a + b
        digits = f"{answer:0{toy.digits + 1}}"[::-1]
        rows.append(f"{a:0{toy.digits}}+{b:0{toy.digits}}={digits}")
    return torch.tensor([[VOCABULARY.index(char) for char in row] for row in rows])


def outputs(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and targets of ids (B, T): the answer's digits only."""
    ids = ids.view(-1, ids.shape[-1])
    target = ids[:, 1:].clone()
    answer = (ids.shape[1] - 3) // 3 + 1
    target[:, :-answer] = IGNORE
    return model(ids[:, :-1]), target


def train(model: nn.Module, data: Tensor, steps: int, toy: Toy, lr: float) -> nn.Module:
    """AdamW on random batches of data (N, T), the learning rate falling to 0."""
    generator = torch.Generator().manual_seed(toy.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(data), (toy.batch,), generator=generator)
        logits, target = outputs(model, data[rows])
        loss = segloss.cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def clean_loss(model: nn.Module, data: Tensor) -> float:
    return segloss.cross_entropy(*outputs(model, data)).item()


@dataclass
class Result:
    comparison: Comparison
    seconds: dict[str, float] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    parameters: int = 0

    @property
    def estimate_seconds(self) -> float:
        return self.seconds["estimates"] / len(self.comparison.subsets)

    @property
    def retrain_seconds(self) -> float:
        return self.seconds["retraining"] / len(self.comparison.subsets)

    @property
    def pays_from(self) -> float:
        """Subsets from which the one-off cost is less than retraining each of them."""
        once = self.seconds["meta-training"] + self.seconds["gradients"]
        return once / (self.retrain_seconds - self.estimate_seconds)


def draw_subsets(toy: Toy) -> list[tuple[str, ...]]:
    """Subsets of a third of the groups, whose share of clean ones runs evenly from 0 to 1."""
    rng = random.Random(f"{toy.seed} subsets")
    clean, noisy = toy.groups[: toy.clean_groups], toy.groups[toy.clean_groups :]
    size = min(len(toy.groups) // 3 + 1, len(clean), len(noisy))
    drawn = []
    for number in range(toy.subsets):
        good = round(number * size / (toy.subsets - 1))
        drawn.append((*rng.sample(clean, good), *rng.sample(noisy, size - good)))
    return drawn


def run(toy: Toy, **settings) -> Result:
    """Everything; `settings` go to GradEx. `relative` because meta-training is a retraining on all
    groups."""
    settings = {"relative": True} | settings
    rng = random.Random(toy.seed)
    seconds: dict[str, float] = {}
    last = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[name], last = now - last, now

    torch.manual_seed(toy.seed)
    base = train(Adder(toy), sums(toy, toy.base_sums, rng), toy.base_steps, toy, 1e-3)
    start = {name: value.clone() for name, value in base.state_dict().items()}
    data = {
        group: sums(toy, toy.group_size, rng, group.startswith("noisy")) for group in toy.groups
    }
    held_out = sums(toy, toy.held_out, rng)
    losses = {"base": clean_loss(base, held_out)}
    lap("base model")

    model = train(base, torch.cat(list(data.values())), toy.steps, toy, toy.lr)
    losses["meta"] = clean_loss(model, held_out)
    lap("meta-training")

    gradex = GradEx(model, dim=toy.dim, seed=toy.seed, outputs=outputs, **settings)
    gradex.collect(
        Sample(f"{group}-{i}", group, row)
        for group, rows in data.items()
        for i, row in enumerate(rows)
    )
    gradex.collect((Sample(str(i), "sums", row) for i, row in enumerate(held_out)), role="target")
    lap("gradients")

    subsets = draw_subsets(toy)
    gradex.rows("train"), gradex.rows("target")
    estimated = [gradex.estimate(subset) for subset in subsets]
    lap("estimates")

    true = []
    for subset in subsets:
        model.load_state_dict(start)
        train(model, torch.cat([data[group] for group in subset]), toy.steps, toy, toy.lr)
        true.append(clean_loss(model, held_out))
    lap("retraining")
    return Result(Comparison(subsets, estimated, true), seconds, losses, gradex.num_parameters)


def lines(toy: Toy, result: Result) -> list[Line]:
    ratio = result.estimate_seconds / result.retrain_seconds
    count = len(result.comparison.subsets)
    return [
        Line("1 - rank correlation with retraining", 1 - result.comparison.spearman, 0.1,
             note=f"{count} subsets"),
        Line("an estimate / a retraining", ratio, 1 / 30,
             note=f"{1e3 * result.estimate_seconds:.0f} ms, {result.retrain_seconds:.1f} s"),
        Line("mean |estimated - true| / true", result.comparison.relative_error, None),
        Line("subsets from which it pays", result.pays_from, None,
             note="meta-training and gradients against retraining"),
    ]  # fmt: skip


# a sum of two digits is learnt in seconds, so there is something for noise to spoil
QUICK = Toy(
    digits=1, width=32, base_steps=300, base_sums=400, steps=100, clean_groups=6, noisy_groups=6,
    group_size=12, held_out=60, subsets=12, dim=100, lr=1e-3,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = options("gradex", (__doc__ or "").partition("\n")[0], rounds=1)
    arguments: argparse.Namespace = parser.parse_args(argv)
    report = Report("GradEx on noisy addition", arguments)
    toy = QUICK if arguments.quick else Toy(subsets=12)
    result = run(toy)
    print(f"{result.comparison}\n")
    report.add(
        Section(
            f"{toy.digits}-digit addition, {result.parameters} parameters",
            "gradex",
            {name: [seconds] for name, seconds in result.seconds.items()},
            lines=lines(toy, result),
            facts={f"{name} loss": f"{value:.4f}" for name, value in result.losses.items()},
            data=asdict(result.comparison),
        )
    )
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())

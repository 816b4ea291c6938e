"""Sample weights on clean and dirty data: fine-tuning, and continued pre-training on text."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor, nn

import segloss
from bench.claims import tasks
from bench.claims.cells import Cell
from bench.claims.losses import MORE_SEEDS, RATES, SEEDS
from bench.claims.model import (
    IGNORE,
    Data,
    Transformer,
    criterion,
    exactness,
    likelihood,
    scored,
    train,
    variant,
)

SETTINGS = ("fine-tuning", "text")
DATA = {"clean": 0.0, "wrong10": 0.1, "wrong30": 0.3, "copies": 0.3}
TEMPERATURES = (0.5, 1.0, 2.0)
SCHEMES = ("irdro", "linupper", "quadratic", "extremes")
BANDS = (0, 1, 2)
VARIANTS = {
    "none": None,
    **{f"{s}-{t:g}": {"scheme": s, "temperature": t} for s in SCHEMES for t in TEMPERATURES},
    **{f"rank-{band}": {"scheme": "rank", "band": band} for band in BANDS},
}
BATCH = 32
DIGITS = 4  # of the sums that a model of three-digit sums is fine-tuned on
STEPS = {"fine-tuning": 150, "text": 80}
SECONDS = {"fine-tuning": 1.3, "text": 1.7}


def weighted(options: dict | None) -> Callable[[nn.Module, Data], Tensor]:
    """Cross-entropy, of which a batch's items weigh by their own losses; by tokens for None."""
    if options is None:
        return criterion("ce")
    weighting = segloss.SampleWeighting(**options)

    def loss(model: nn.Module, data: Data) -> Tensor:
        logits = model(data.ids)
        stats = segloss.logit_statistics(logits.detach(), data.target)
        _, weights = weighting.from_tokens(stats.log_prob, valid=stats.valid)
        each = segloss.token_weights(stats.valid.sum(1), sample_weights=weights)
        return segloss.cross_entropy(
            logits,
            data.target,
            token_weight=each.float()[:, None].expand_as(data.target),
            normalizer=1,
        )

    return loss


# ---------------------------------------------------------------------------------- dirty data


def spoilt(data: Data, kind: str, wrong: Callable[[Data], Data], seed: int) -> Data:
    """A share of the items replaced: by wrong ones, or by copies of a hundredth of the items."""
    items = len(data.ids)
    draw = tasks.generator(kind, seed)
    rows = torch.randperm(items, generator=draw)[: round(DATA[kind] * items)]
    ids, target = data.ids.clone(), data.target.clone()
    if kind == "copies":
        few = torch.randperm(items, generator=draw)[: max(1, items // 100)]
        source = few[torch.randint(len(few), (len(rows),), generator=draw)]
        ids[rows], target[rows] = data.ids[source], data.target[source]
        # near-duplicates: one of the first tokens read is another item's
        place = torch.randint(DIGITS, (len(rows),), generator=draw)
        ids[rows, place] = data.ids[rows, place]
    else:
        ids[rows], target[rows] = wrong(data.rows(rows))
    return Data(ids, target)


def wrong_sums(data: Data) -> Data:
    """The answers of other items."""
    ids, target = data.ids.clone(), data.target.roll(1, 0)
    ids[:, DIGITS + 1 :] = target[:, DIGITS:-1]
    return Data(ids, target)


def wrong_text(data: Data) -> Data:
    """The same words in a random order, as a failed extraction leaves them."""
    draw = tasks.generator("words", len(data.ids))
    whole = torch.cat([data.ids, data.target[:, -1:].clamp(min=tasks.UNKNOWN)], 1)
    mixed = whole.gather(1, torch.rand(whole.shape, generator=draw).argsort(1))
    target = mixed[:, 1:].masked_fill(mixed[:, 1:] == tasks.UNKNOWN, IGNORE)
    return Data(mixed[:, :-1], target)


# ----------------------------------------------------------------------------------------- runs


@cache
def base(setting: str, quick: bool) -> Transformer:
    """What fine-tuning starts from, the same for every seed."""
    torch.manual_seed(0)
    steps = 5 if quick else {"fine-tuning": 120, "text": 400}[setting]
    if setting == "text":
        model, data = Transformer(2048, tasks.LENGTH), tasks.text().general.train
    else:
        # sums of three columns; the fourth's place is not learnt
        model, data = Transformer(101, 2 * DIGITS + 1), tasks.addition(BATCH * steps, "base", 3)
    return train(model, data, 1e-2, criterion("ce"), steps=steps, batch=BATCH, seed=0)


def run(setting: str, kind: str, name: str, seeds: int, steps: int, quick: bool) -> dict:
    text = setting == "text"
    items = 100 if quick else 1000

    def part(which: str, seed: int) -> Data:
        if which == "train":
            clean = (
                tasks.text().medical.train
                if text
                else tasks.addition(BATCH * steps // 2, ("train", seed), DIGITS)
            )
            return spoilt(clean, kind, wrong_text if text else wrong_sums, seed)
        if text:
            return getattr(tasks.text().medical, which).rows(slice(0, items))
        return tasks.addition(items, which, DIGITS)

    def once(rate: float, seed: int, which: str) -> dict:
        model = copy.deepcopy(base(setting, quick))
        loss = weighted(VARIANTS[name])
        train(model, part("train", seed), rate, loss, steps=steps, batch=BATCH, seed=seed)
        return scored(model, part(which, seed))

    result = variant(once, RATES, seeds, likelihood if text else exactness)
    return result | {"weighting": VARIANTS[name], "items": items}


def cells(quick: bool = False) -> list[Cell]:
    if quick:
        return [
            Cell(f"irdro/{s}/{k}/{v}", partial(run, s, k, v, 2, 4, True), 4, 2)
            for s in SETTINGS
            for k, v in (("wrong30", "none"), ("wrong30", "irdro-1"), ("copies", "rank-1"))
        ]
    found = []
    for setting in SETTINGS:
        steps = STEPS[setting]
        for kind in DATA:
            for name in VARIANTS:
                first = name == "none" or name.startswith("irdro")
                seeds = MORE_SEEDS if first else SEEDS
                found.append(
                    Cell(
                        f"irdro/{setting}/{kind}/{name}",
                        partial(run, setting, kind, name, seeds, steps, False),
                        4 if first else 6,
                        SECONDS[setting] * (seeds + len(RATES)),
                    )
                )
    return found

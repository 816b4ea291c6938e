"""The named inputs, as logits or as hidden states and a head, always in float32.

    zipf       targets by Zipf's law; from hopeless to certain, each token with a lift of its own
    saturated  the same, but 30 % of the tokens have p = 1 exactly in float32
    flat       nothing is known: normal noise of deviation 1 / 8, as before training; logits only
    smollm2    hidden states and head of SmolLM2-135M on the prompts and answers of BoolQ and ASDiv,
               targets the tokens that really follow

N tokens, D hidden size, V classes.
"""

from __future__ import annotations

import contextlib
import functools
import io

import torch
from torch import Tensor

import segloss

# those that limits are set on, and those that are measured
NAMES = ("zipf", "smollm2", "saturated")
ALL_NAMES = (*NAMES, "flat")
FLAT_DEVIATION = 1 / 8
SATURATED_SHARE = 0.3
# z_y - z_j of a saturated token: e^-40 is far below the rounding of 1 in float32, V times over
SATURATED_LIFT = 60.0
SEQUENCE = 128


def zipf_prior(num_classes: int, generator: torch.Generator) -> Tensor:
    """(V,) probabilities 1 / rank, the ranks in random order."""
    rank = 1 + torch.randperm(num_classes, generator=generator)
    return (1 / rank) / (1 / rank).sum()


def zipf(name: str, num_tokens: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """(logits (N, V), target (N,)): log prior + noise + a lift of 0 to 14 at the target."""
    generator = torch.Generator().manual_seed(0)
    prior = zipf_prior(num_classes, generator)
    target = torch.multinomial(prior, num_tokens, replacement=True, generator=generator)
    logits = torch.randn(num_tokens, num_classes, generator=generator)
    if name == "flat":
        return logits.mul_(FLAT_DEVIATION), target
    logits.add_(prior.log())
    lift = 14 * torch.rand(num_tokens, generator=generator)
    logits[torch.arange(num_tokens), target] += saturate(name, lift, generator)
    return logits, target


def zipf_head(
    name: str, num_tokens: int, width: int, num_classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden (N, D), weight (V, D), target (N,)): each hidden state leans towards its target's row
    of the weight, by 0 to 24 at unit rows."""
    generator = torch.Generator().manual_seed(0)
    prior = zipf_prior(num_classes, generator)
    target = torch.multinomial(prior, num_tokens, replacement=True, generator=generator)
    weight = torch.randn(num_classes, width, generator=generator).mul_(width**-0.5)
    hidden = torch.randn(num_tokens, width, generator=generator)
    lift = saturate(name, 24 * torch.rand(num_tokens, generator=generator), generator)
    return hidden + lift[:, None] * weight[target], weight, target


def head_of(
    name: str, num_tokens: int, width: int, num_classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`zipf_head` in bfloat16."""
    hidden, weight, target = zipf_head(name, num_tokens, width, num_classes)
    return hidden.to(torch.bfloat16), weight.to(torch.bfloat16), target


def saturate(name: str, lift: Tensor, generator: torch.Generator) -> Tensor:
    if name != "saturated":
        return lift
    chosen = torch.randperm(lift.numel(), generator=generator) < SATURATED_SHARE * lift.numel()
    return torch.where(chosen, SATURATED_LIFT, lift)


@functools.cache
def states(model: str, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden (N', D), weight (V, D), next tokens (N',)) of at least `num_tokens` real tokens.

    `model` as for `segloss train --model`, or gemma3. The text is prompts and answers of
    `bench.tasks`, one after the other, cut into sequences of 128 tokens.
    """
    from bench import gemma
    from bench.tasks import examples
    from segloss.train import model as models

    if model == "gemma3":
        model = gemma.file()
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        network, tokenizer = models.load(model)
    ids: list[int] = []
    wanted = -(-num_tokens // SEQUENCE) * (SEQUENCE + 1)
    tasks = [examples(task) for task in ("boolq", "asdiv")]
    for pair in zip(*tasks, strict=False):
        for prompt, completion in pair:
            ids += tokenizer(prompt + completion)["input_ids"]
            ids.append(tokenizer.eos_token_id)
        if len(ids) >= wanted:
            break
    rows = torch.tensor(ids[:wanted]).view(-1, SEQUENCE + 1)
    with torch.no_grad():
        hidden = network.base_model(input_ids=rows[:, :-1]).last_hidden_state
    weight = network.get_output_embeddings().weight.detach().clone()
    return hidden.flatten(0, 1), weight, rows[:, 1:].flatten()


def real_head(model: str, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden (N, D), weight (V, D), target (N,)) of a real model."""
    hidden, weight, target = states(model, num_tokens)
    return hidden[:num_tokens], weight, target[:num_tokens]


def real_logits(num_tokens: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """(logits (N, V), target (N,)) of SmolLM2, its head cut to the first V classes.

    A token id is about a rank of frequency, so the first 32,768 of 49,152 hold most of a text;
    tokens followed by another one are left out. The softmax is over the V classes that stay.
    """
    hidden, weight, target = states("smollm2", 2 * num_tokens)
    kept = (target < num_classes).nonzero()[:num_tokens, 0]
    return hidden[kept] @ weight[:num_classes].T, target[kept]


def dense(name: str, num_tokens: int, num_classes: int) -> tuple[Tensor, Tensor]:
    if name == "smollm2":
        return real_logits(num_tokens, num_classes)
    return zipf(name, num_tokens, num_classes)


def facts(logits, target: Tensor) -> dict[str, str]:
    """What an input is like, for the report; logits a tensor or a source."""
    with torch.no_grad():
        stats = segloss.logit_statistics(logits, target, entropy=True)
    p = stats.log_prob.exp()
    return {
        "classes": f"{target.unique().numel()} occur as targets",
        "p of target": f"mean {p.mean():.3f}, exactly 1 at {(p == 1).float().mean():.1%} of tokens",
        "entropy": f"mean {stats.entropy.mean():.2f} nats",
    }

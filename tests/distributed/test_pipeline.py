"""Pipeline and context parallelism: the head on the last stage, sequences cut by hand."""

import pytest
import ranks
import torch
import vocab_cases
from helpers import assert_near
from torch.nn import functional as F

import segloss
from segloss.integrations.examples import pipeline

B, T = 4, 10
# every rank has other places of the same sequences, the last none that is valid
CUTS = [slice(0, 7), slice(7, 10)]
NAMES = ("ce, all options", "dice, per sample", "dice, all", "lovasz", "lovasz, per sample")


def stages() -> tuple:
    torch.manual_seed(0)
    return pipeline.First().double(), pipeline.Last().double()


def batch() -> tuple:
    tokens, prompt = pipeline.sequences(8)
    return tokens, pipeline.next_tokens(tokens, prompt)


def grads_of(model) -> list:
    return [parameter.grad for parameter in model.parameters()]


def piped(rank: int) -> tuple:
    """(loss, gradients) of this rank's stage."""
    model, (tokens, target) = stages()[rank], batch()
    num_tokens = (target != -100).sum()
    criterion = 0.6 * segloss.CrossEntropyLoss() + 0.4 * segloss.FocalLoss()
    schedule = pipeline.schedule_of(model, rank, criterion, num_tokens, 4)
    return pipeline.step(schedule, rank, tokens, target), grads_of(model)


def sequences() -> tuple:
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(B, T, vocab_cases.V, generator=g, dtype=torch.float64)
    target = torch.randint(8, (B, T), generator=g)
    logits = logits.scatter_add(2, target[..., None], torch.full((B, T, 1), 2.0).double())
    target[:, ::4] = -100
    target[:, CUTS[1]] = -100
    target[0, 8] = 3
    return logits, target, torch.arange(B)[:, None].expand(B, T)


def cut_sequences(rank: int, group) -> dict:
    logits, target, ids = (x[:, CUTS[rank]] for x in sequences())
    found = {}
    for name in NAMES:
        leaf = logits.clone().requires_grad_()
        value = vocab_cases.losses(group)[name](leaf, target, sample_ids=ids)
        found[name] = value.detach(), torch.autograd.grad(value, leaf)[0]
    return found


def results(rank, group):
    return {"pipeline": piped(rank), "context": cut_sequences(rank, group)}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return ranks.spawn(results, tmp_path_factory.mktemp("pipeline"))


def test_the_head_on_the_last_stage(found):
    (first, last), (tokens, target) = stages(), batch()
    logits = F.linear(last(first(tokens)), last.head.weight).flatten(0, 1)
    log_prob = -F.cross_entropy(logits, target.flatten(), reduction="none")
    focal = -((1 - log_prob.exp()) ** 2) * log_prob
    valid = target.flatten() != -100
    loss = (0.6 * -log_prob + 0.4 * focal)[valid].mean()
    loss.backward()
    assert_near(found[1]["pipeline"][0], loss.detach())
    for model, rank in zip((first, last), found, strict=True):
        for ours, true in zip(rank["pipeline"][1], grads_of(model), strict=True):
            assert_near(ours, true)


@pytest.mark.parametrize("name", NAMES)
def test_context_parallel_sequences(found, name):
    logits, target, ids = sequences()
    leaf = logits.requires_grad_()
    value = vocab_cases.losses()[name](leaf, target, sample_ids=ids)
    (grad,) = torch.autograd.grad(value, leaf)
    for cut, rank in zip(CUTS, found, strict=True):
        assert_near(rank["context"][name][0], value.detach())
        assert_near(rank["context"][name][1], grad[:, cut])

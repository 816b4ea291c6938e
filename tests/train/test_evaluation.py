"""Exact match, what guessing scores, the bootstrap, and the held-out loss."""

import math

import numpy as np
import pytest
import torch
from train.tiny import build_model

from segloss.train import data
from segloss.train.evaluation import (
    Evaluator,
    bootstrap_interval,
    chance,
    exact_match,
    majority,
    normalise,
)
from segloss.train.tasks import Example


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (' "48\tPoints." ', "48 points"),
        ("$5.50", "$5.50"),
        ("**Yes**!", "yes"),
        ("STRASSE", "strasse"),
        ("Straße", "strasse"),
        (" ... ", ""),
    ],
)
def test_normalise(text, expected):
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("answer", "completion", "matches"),
    [
        (" yes", "Yes.", True),
        (" Yes\nThe passage says", " Yes", True),
        ("\n\n Yes", " Yes", True),
        (" Yes, it does", " Yes", False),
        ("", " Yes", False),
        (" a\nb\nc", "a\nb", True),
        (" a\nc", "a\nb", False),
        (" a", "a\nb", False),
    ],
)
def test_exact_match(answer, completion, matches):
    assert exact_match(answer, completion) is matches


def example(completion, options=()):
    return Example("t", "p", completion, options)


def test_chance():
    options = ("a", "b"), ("a", "b", "c", "d")
    assert chance([example("a", o) for o in options]) == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert chance([example("a", options[0]), example("a")]) is None


def test_majority_is_of_the_training_part():
    train = [example(text) for text in (" Yes", "no", "yes.", "no", "YES")]
    held_out = [example(text) for text in ("no", "no", "yes", "maybe")]
    assert majority(train, held_out) == ("yes", 1 / 4)


def test_majority_breaks_ties_by_the_alphabet():
    assert majority([example("b"), example("a")], [example("a")]) == ("a", 1.0)


def test_bootstrap_of_a_certain_gain():
    assert bootstrap_interval([False] * 5, [True] * 5) == (1.0, 1.0)
    assert bootstrap_interval([True, False], [True, False]) == (0.0, 0.0)


def test_bootstrap_of_two_items():
    """Means 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4."""
    assert bootstrap_interval([False, False], [True, False]) == (0.0, 1.0)
    assert bootstrap_interval([False, False], [True, False], level=0.4) == (0.5, 0.5)


def test_bootstrap_equals_the_binomial_quantiles():
    """40 of 100 items gained: the resampled gain is Binomial(100, 0.4) / 100."""
    chances = [math.comb(100, k) * 0.4**k * 0.6 ** (100 - k) for k in range(101)]
    low, high = np.searchsorted(np.cumsum(chances), [0.025, 0.975]) / 100
    interval = bootstrap_interval([False] * 100, [True] * 40 + [False] * 60, seed=1)
    assert interval == pytest.approx((low, high), abs=0.011)


def test_bootstrap_is_paired():
    """A loss and a gain on other items cancel in the mean, not in the spread."""
    low, high = bootstrap_interval([True, False] * 20, [False, True] * 20)
    assert low < -0.2 and high > 0.2
    assert bootstrap_interval([True, False] * 20, [True, False] * 20) == (0.0, 0.0)


# ------------------------------------------------------------------------------------ the model

ROWS = [("a b c", " three"), ("z", " seven"), ("long long prompt", " x")]


@pytest.fixture
def task(tokenizer):
    return data.TaskData("t", [], data.encode([Example("t", *row) for row in ROWS], tokenizer))


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_held_out_loss_is_the_mean_over_completion_tokens(task, tokenizer, batch_size):
    model = build_model()
    total, tokens = 0.0, 0
    for item in task.held_out:
        ids = torch.tensor([item.prompt_ids + item.completion_ids])
        log_prob = model(ids).logits.log_softmax(-1)[0, len(item.prompt_ids) - 1 : -1]
        total -= log_prob.gather(1, torch.tensor(item.completion_ids)[:, None]).sum().item()
        tokens += len(item.completion_ids)
    result = Evaluator(tokenizer, batch_size)(model, task)
    assert result.loss == pytest.approx(total / tokens, rel=1e-5)


def greedy(model, item, tokenizer, limit):
    """Token after token, without padding, cache or `generate`."""
    ids = list(item.prompt_ids)
    for _ in range(limit):
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[len(item.prompt_ids) :], skip_special_tokens=True)


def test_answers_are_greedy_and_in_order(task, tokenizer):
    model = build_model()
    limit = max(len(item.completion_ids) for item in task.held_out) + 4
    model.train()
    result = Evaluator(tokenizer, batch_size=2)(model, task)
    assert result.answers == [greedy(model, item, tokenizer, limit) for item in task.held_out]
    assert result.correct == [False] * 3 and result.exact_match == 0
    assert model.training

"""Trainers on two processes: the averaged gradient is that of one process with the whole batch."""

import integration_worker
import pytest
import ranks
import torch
from integration_helpers import (
    PAIRS,
    TASK_WEIGHTS,
    assert_same_steps,
    by_task,
    coba,
    irdro,
    losses_of,
    plain_batch,
    plain_training,
    tiny_model,
    tiny_rows,
    validation_batches,
    watch,
    weighed,
)
from integration_worker import ACCUMULATION, ALIKE, TEMPERATURE

import segloss

pytest.importorskip("datasets")
from integrations import test_trainer


@pytest.fixture(scope="module")
def per_rank(tmp_path_factory):
    return ranks.spawn(integration_worker.results, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(params=ACCUMULATION, ids=lambda n: f"{n} micro-batches")
def trained(request, per_rank):
    """Steps and logs of a case, the gradients the same on both ranks."""

    def of(name):
        (steps, logs), (others, _) = (rank[name, request.param] for rank in per_rank)
        for (_, grad), (_, other) in zip(steps, others, strict=True):
            assert torch.equal(grad, other)
        return steps, logs

    return of


def test_token_losses(trained):
    """By the count of tokens over both; the labels of the ranks differ in number."""
    plain = plain_training(tiny_model(), tiny_rows(), PAIRS["focal"][1])
    assert_same_steps(trained("focal")[0], plain)
    assert_same_steps(trained("compute_loss_func")[0], plain)
    assert_same_steps(trained("fuse_loss")[0], plain)
    steps, logs = trained("trl")
    assert_same_steps(steps, plain)
    assert [line["num_tokens"] for line in logs[:2]] == [36, 72]


@pytest.mark.parametrize("accumulation", ACCUMULATION)
@pytest.mark.parametrize("name", [*ALIKE, "own group"])
def test_all_that_is_logged_is_one_process_s(name, accumulation, per_rank, tmp_path):
    """And so are the gradients, for losses of sets of tokens too."""
    loss = ALIKE.get(name, segloss.DiceLoss())
    alone = test_trainer.trainer(tmp_path, accumulation=accumulation, loss=loss)
    expected, logs = watch(alone), list(alone.state.log_history)
    evaluated = alone.evaluate(tiny_rows()[:5])
    for steps, logged in (rank[name, accumulation] for rank in per_rank):
        assert_same_steps(steps, expected)
        for line, other in zip(logged[:2], logs[:2], strict=True):
            for key in ("loss", "nll", "perplexity", "entropy", "mean_token_accuracy", "grad_norm"):
                assert line[key] == pytest.approx(other[key], rel=1e-6), key
        if name in ALIKE:  # the fifth row is evaluated beside three that are repeated
            for key in ("nll", "perplexity", "entropy", "mean_token_accuracy"):
                key = f"eval_{key}"
                assert logged[-1][key] == pytest.approx(evaluated[key], rel=1e-9), key


def test_sample_weighting(trained):
    steps, logs = trained("sample weights")
    loss = weighed(irdro(TEMPERATURE))
    assert_same_steps(steps, plain_training(tiny_model(), tiny_rows(), loss))
    assert 1 < logs[0]["effective_sample_size"] < 4
    ids, target = plain_batch(tiny_rows()[:4])
    log_p = torch.log_softmax(tiny_model()(input_ids=ids).logits.detach(), -1)[target != -100]
    target = target[target != -100]
    hits, number = (log_p.argmax(-1) == target).sum().item(), len(target)
    entropy = -(log_p.exp() * log_p).sum().item()
    assert logs[0]["mean_token_accuracy"] == pytest.approx(hits / number)
    assert logs[0]["entropy"] == pytest.approx(entropy / number)


def test_column_of_weights(trained):
    """A sample's share is of the weights on both ranks."""
    model, expected = tiny_model(), []
    for start in (0, 4):
        rows = integration_worker.weighted_rows()[start : start + 4]
        weight = torch.tensor([row["sample_weights"] for row in rows], dtype=torch.float64)
        share = weight / weight.sum()
        loss = weighed(lambda nll, valid, w=share: (w / valid.sum(1))[:, None] * valid)
        expected += plain_training(model, rows, loss, steps=1)
    assert_same_steps(trained("column of weights")[0], expected, 1e-6)  # collated as float32


def test_task_weights(trained):
    assert_same_steps(trained("task weights")[0], by_tasks(lambda step, model: TASK_WEIGHTS))


def test_coba_and_sample_weights(trained):
    """A rank measures its own validation batches: 0 and 2, or 1 before the second step again."""
    balancer, batches = coba(), list(validation_batches())
    parts = [batches, [batches[0], batches[1]]]

    def weights(step, model):
        losses, counts = losses_of(model, parts[step])
        balancer.update(losses, step=step, counts=counts)
        return balancer.weights().double()

    steps, logs = trained("coba and sample weights")
    assert_same_steps(steps, by_tasks(weights, TEMPERATURE))
    assert logs[0]["task_weight_0"] != logs[1]["task_weight_0"]


def by_tasks(weights, share=None):
    """Steps in plain PyTorch, with the task weights of `weights(step, model)`."""
    model, found = tiny_model(), []
    for step in range(2):
        rows = tiny_rows()[4 * step : 4 * step + 4]
        loss = weighed(by_task(rows, weights(step, model), share))
        found += plain_training(model, rows, loss, steps=1)
    return found

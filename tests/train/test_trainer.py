"""The trainer's loss is the loss of the completion tokens, whatever the accumulation."""

import functools

import pytest
import torch
import transformers
from train.tiny import build_model

import segloss
from segloss import reference
from segloss.sources import as_source
from segloss.train import data
from segloss.train.config import TrainConfig
from segloss.train.expression import parse_loss
from segloss.train.tasks import Example
from segloss.train.trainer import EachRow, Trainer, rate_share

ROWS = [("one two", " three"), ("four", " five six seven"), ("eight nine ten", " no"), ("x", " y")]


@pytest.fixture
def items(tokenizer):
    return data.encode([Example("t", *row) for row in ROWS], tokenizer)


def trainer(items, loss, batch_size, model=None, dtype=None, steps=1, validation=None, **settings):
    """A Trainer over `items` in their order, as many steps as asked for, each over all of them.

    Each task validates on its first item.
    """
    config = TrainConfig(
        data=("x",),
        output=".",
        steps=steps,
        batch_size=batch_size,
        accumulation=len(items) // batch_size,
        max_grad_norm=0.0,
        **settings,
    ).resolved()
    names = list(dict.fromkeys(item.example.task for item in items))
    tasks = [
        data.TaskData(name, own, [], (validation or {}).get(name, own[:1]))
        for name in names
        for own in [[item for item in items if item.example.task == name]]
    ]
    if model is None:
        model = build_model().double()
    loop = Trainer(model, tasks, loss, config, pad_id=257, dtype=dtype)
    loop.train_dataset = items * config.steps
    return loop


class Gradients(transformers.TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.of_step = [parameter.grad.clone() for parameter in model.parameters()]


def trained(loop):
    """(rows of metrics, gradients of the last step)."""
    rows, gradients = [], Gradients()
    loop.add_callback(EachRow(rows.append))
    loop.add_callback(gradients)
    loop.train()
    return rows, gradients.of_step


def step(items, loss, batch_size, **settings):
    """(row of metrics, gradients) of one step over `items` in float64."""
    (row,), gradients = trained(trainer(items, parse_loss(loss), batch_size, **settings))
    return row, gradients


def completion_rows(model, item):
    """Logits (M, V) that predict the completion of one item alone, and their targets (M,)."""
    ids = torch.tensor([item.prompt_ids + item.completion_ids])
    logits = model(ids).logits[0]
    start = len(item.prompt_ids)
    return logits[start - 1 : -1], ids[0, start:]


@pytest.mark.parametrize(
    ("expression", "naive"),
    [
        ("ce", reference.cross_entropy),
        ("focal(gamma=1)", functools.partial(reference.focal_loss, gamma=1)),
        ("lovasz", reference.lovasz_softmax),
        ("dice", reference.dice_loss),
    ],
)
def test_loss_and_gradient_are_those_of_the_completion_tokens(items, expression, naive):
    row, grads = step(items, expression, batch_size=4)
    model = build_model().double()
    logits, targets = zip(*(completion_rows(model, item) for item in items), strict=True)
    expected = naive(torch.cat(logits), torch.cat(targets))
    assert row["loss"] == pytest.approx(expected.item(), rel=1e-12)
    expected_grads = torch.autograd.grad(expected, list(model.parameters()))
    for got, true in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("expression", ["ce", "ce + 0.5*focal", "sadl"])
def test_accumulating_four_batches_is_one_batch_for_token_losses(items, expression):
    one_row, one = step(items, expression, batch_size=4)
    four_row, four = step(items, expression, batch_size=1)
    assert four_row["loss"] == pytest.approx(one_row["loss"], rel=1e-12)
    for got, true in zip(four, one, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-9, atol=1e-12)


def test_accumulated_region_losses_are_a_token_weighted_mean(items):
    row, _ = step(items, "dice", batch_size=2)
    model = build_model().double()
    values, tokens = [], []
    for pair in (items[:2], items[2:]):
        logits, targets = zip(*(completion_rows(model, item) for item in pair), strict=True)
        values.append(reference.dice_loss(torch.cat(logits), torch.cat(targets)).item())
        tokens.append(sum(len(target) for target in targets))
    expected = sum(v * t for v, t in zip(values, tokens, strict=True)) / sum(tokens)
    assert row["loss"] == pytest.approx(expected, rel=1e-6)


WEIGHTINGS = {
    "coba": {"task_weights": "coba"},
    "irdro": {"sample_weights": "irdro"},
    "both": {"task_weights": "coba", "sample_weights": "irdro", "sample_temperature": 0.3},
    "rank": {"sample_weights": "rank"},
}


@pytest.fixture
def two_tasks(tokenizer):
    names = ("a", "b", "b", "a")
    rows = [Example(name, *row) for name, row in zip(names, ROWS, strict=True)]
    return data.encode(rows, tokenizer)


def weighted_step(items, batch_size, loss="ce", **settings):
    """(row, gradients) with CoBa as it stands after some steps."""
    loop = trainer(items, parse_loss(loss), batch_size, **settings)
    if loop.task_weights is not None:
        loop.task_weights.weights = lambda: torch.tensor([0.3, 0.7], dtype=torch.float64)
    (row,), gradients = trained(loop)
    return row, gradients


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weighted_loss_and_gradient(two_tasks, name):
    """sum over tasks of omega * (weighted mean over its samples), each sample alone in float64."""
    settings = WEIGHTINGS[name]
    row, gradients = weighted_step(two_tasks, 4, **settings)
    model = build_model().double()
    losses = [
        reference.cross_entropy(*completion_rows(model, item), reduction="none")
        for item in two_tasks
    ]
    means = torch.stack([loss.mean() for loss in losses])
    tokens = torch.tensor([float(len(loss)) for loss in losses], dtype=torch.float64)
    w = tokens
    if settings.get("sample_weights") == "irdro":
        w = (means.detach() / settings.get("sample_temperature", 1.0)).softmax(0)
    elif settings.get("sample_weights") == "rank":
        w = torch.zeros(4, dtype=torch.float64)
        w[means.argsort(descending=True)[1]] = 1.0  # the second of four quarters
    if "task_weights" in settings:
        task = torch.tensor([0, 1, 1, 0])
        share = [w * (task == k) / (w * (task == k)).sum() for k in (0, 1)]
        w = 0.3 * share[0] + 0.7 * share[1]
    expected = (w * means).sum()
    assert row["loss"] == pytest.approx(expected.item(), rel=1e-9)
    grads = torch.autograd.grad(expected, list(model.parameters()))
    for got, true in zip(gradients, grads, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_weights_do_not_depend_on_the_accumulation(two_tasks, name, batch_size):
    one, whole = weighted_step(two_tasks, 4, loss="ce + 0.5*focal", **WEIGHTINGS[name])
    many, parts = weighted_step(two_tasks, batch_size, loss="ce + 0.5*focal", **WEIGHTINGS[name])
    for key in ("loss", "token_accuracy", "entropy", "task_loss"):
        assert many[key] == pytest.approx(one[key], rel=1e-9, nan_ok=True), key
    if "sample_weights" in WEIGHTINGS[name]:
        ess = one["effective_sample_size"]
        assert many["effective_sample_size"] == pytest.approx(ess, rel=1e-9)
        assert many["sample_weight_counts"] == one["sample_weight_counts"]
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


def test_region_losses_see_tokens_that_weigh_one(two_tasks):
    """Equal weights through the machinery of weights change nothing, smoothing included."""
    plain, _ = weighted_step(two_tasks, 4, loss="dice(smooth=1.0)")
    settings = {"sample_weights": "irdro", "sample_burn_in": 1}
    one_each = [data.Encoded(i.example, i.prompt_ids, i.completion_ids[:3]) for i in two_tasks[:3]]
    equal, _ = weighted_step(one_each, 3, loss="dice(smooth=1.0)", **settings)
    same, _ = weighted_step(one_each, 3, loss="dice(smooth=1.0)")
    assert equal["loss"] == pytest.approx(same["loss"], rel=1e-12)
    assert equal["loss"] != pytest.approx(plain["loss"], rel=1e-3)


def test_the_pass_for_sample_weights_draws_the_same_dropout(two_tasks, monkeypatch):
    """The losses that weights come from are those that are trained on."""
    settings = {"sample_weights": "irdro", "sample_temperature": 0.3}
    seen, weigh = [], segloss.SampleWeighting.__call__
    monkeypatch.setattr(
        segloss.SampleWeighting,
        "__call__",
        lambda self, losses: weigh(self, seen.append(losses) or losses),
    )

    def losses(dropout):
        model = build_model().double()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = dropout
        (row,), _ = trained(trainer(two_tasks, parse_loss("ce"), 1, model, **settings))
        return seen.pop(), row

    first, row = losses(0.5)
    w = (first / 0.3).softmax(0)
    assert row["loss"] == pytest.approx((w * first).sum().item(), rel=1e-9)
    assert not torch.allclose(first, losses(0.0)[0])


def test_statistics_of_a_step(two_tasks):
    row, _ = weighted_step(two_tasks, 2)
    model = build_model().double()
    rows = [completion_rows(model, item) for item in two_tasks]
    logits, target = torch.cat([r[0] for r in rows]), torch.cat([r[1] for r in rows])
    log_p = logits.log_softmax(-1)
    assert row["token_accuracy"] == (logits.argmax(-1) == target).double().mean().item()
    assert row["entropy"] == pytest.approx(-(log_p.exp() * log_p).sum(-1).mean().item(), rel=1e-9)
    own = torch.cat([-log_p.gather(1, target[:, None])[:, 0]]).split([len(r[1]) for r in rows])
    expected = {"a": torch.cat([own[0], own[3]]).mean(), "b": torch.cat(own[1:3]).mean()}
    assert row["task_loss"] == pytest.approx({k: v.item() for k, v in expected.items()}, rel=1e-9)


def validation_losses(model, items):
    """Cross-entropy per token of tasks a and b."""
    sums, tokens = {"a": 0.0, "b": 0.0}, {"a": 0, "b": 0}
    for item in items:
        loss = reference.cross_entropy(*completion_rows(model, item), reduction="sum")
        sums[item.example.task] += loss.item()
        tokens[item.example.task] += len(item.completion_ids)
    return [sums[task] / tokens[task] for task in sums]


def test_coba_reads_the_validation_items_in_turn(two_tasks):
    """All of them before the first step, then `validation_batch` of each task after every step."""
    a, b = [two_tasks[0], two_tasks[3], two_tasks[0]], [*two_tasks[1:3], two_tasks[1]]
    settings = {"task_weights": "coba", "validation_batch": 2, "steps": 3, "lr": 1e-12}
    loop = trainer(two_tasks, parse_loss("ce"), 4, validation={"a": a, "b": b}, **settings)
    told, update = [], loop.task_weights.update
    loop.task_weights.update = lambda losses, **more: (told.append(losses), update(losses, **more))
    trained(loop)
    model = build_model().double()
    parts = [(a, b), (a[:2], b[:2]), (a[2:], b[2:]), (a[:2], b[:2])]
    for losses, (of_a, of_b) in zip(told, parts, strict=True):
        assert losses.tolist() == pytest.approx(validation_losses(model, of_a + of_b), rel=1e-9)


def test_coba_in_the_loop_equals_coba_by_hand(two_tasks):
    settings = {"task_weights": "coba", "coba_warmup": 2, "coba_history": 4}
    loop = trainer(two_tasks, parse_loss("ce"), 4, steps=5, lr=0.05, **settings)
    coba = segloss.CoBa(2, warmup=2, history=4)
    before = validation_losses(build_model().double(), two_tasks[:2])
    coba.update(torch.tensor(before, dtype=torch.float64))
    rows, _ = trained(loop)
    assert len(rows) == 5
    for row in rows:
        weights = coba.weights().tolist()
        assert list(row["task_weight"].values()) == pytest.approx(weights)
        losses = torch.tensor(list(row["validation_loss"].values()), dtype=torch.float64)
        coba.update(losses, step=row["step"])
    assert weights != pytest.approx([0.5, 0.5], abs=1e-3)
    after = validation_losses(loop.model, two_tasks[:2])
    assert losses.tolist() == pytest.approx(after, rel=1e-9)


def test_learning_rate_rises_and_falls(items):
    rates = [rate_share(step, 30) for step in range(30)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1]) and rates[3] < 1
    assert rates[3:] == sorted(rates[3:], reverse=True) and 0 < rates[-1] < 0.04
    rows, _ = trained(trainer(items, parse_loss("ce"), 4, steps=30, lr=0.01))
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.01 * r for r in rates])


def test_it_is_the_trainer_of_transformers_and_takes_adamw_steps(items):
    """The weights after two steps are those of torch's AdamW on plain gradients, decay apart."""
    loop = trainer(items, parse_loss("ce"), 2, steps=2, lr=0.01, weight_decay=0.1)
    assert isinstance(loop, transformers.Trainer)
    trained(loop)
    model = build_model().double()
    named = dict(model.named_parameters())
    vectors = [p for p in named.values() if p.dim() == 1]
    groups = [{"params": [p for p in named.values() if p.dim() == 2]}]
    groups += [{"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    for number in range(2):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * rate_share(number, 2)
        optimizer.zero_grad()
        logits, targets = zip(*(completion_rows(model, item) for item in items), strict=True)
        torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(targets)).backward()
        optimizer.step()
    for name, parameter in loop.model.named_parameters():
        torch.testing.assert_close(parameter, named[name], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("head", ["fused", "logits"])
def test_logits_keep_the_autocast_dtype(items, head):
    """Accelerate's own mixed precision would copy them to float32."""
    seen = []

    class Spy(segloss.CrossEntropyLoss):
        def forward(self, logits, target, **options):
            source = as_source(logits)
            dtype = source.product_dtype if head == "fused" else source.logits.dtype
            seen.append((dtype, source.leading_shape == target.shape))
            return super().forward(logits, target, **options)

    loop = trainer(
        items[:2], Spy(), batch_size=2, model=build_model(), dtype=torch.bfloat16, head=head
    )
    loop.train()
    assert seen == [(torch.bfloat16, True)]

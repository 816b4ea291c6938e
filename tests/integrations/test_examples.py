"""The plain PyTorch and the Lightning example, against full logits."""

import pytest
import torch
from integration_helpers import plain_cross_entropy, plain_focal

import segloss
from segloss.integrations.examples import pytorch


def plain(model, logits, target):
    return 0.6 * plain_cross_entropy(logits, target) + 0.4 * plain_focal(logits, target)


def double_model():
    torch.manual_seed(0)
    return pytorch.TinyModel().double()


def data():
    tokens, prompt = pytorch.sequences(8)
    return tokens, pytorch.next_tokens(tokens, prompt)


CRITERION = 0.6 * segloss.CrossEntropyLoss() + 0.4 * segloss.FocalLoss()


def two_plain_steps():
    """[(loss, gradients)] of AdamW on full logits."""
    model, (tokens, target), found = double_model(), data(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        hidden, _ = model.mix(model.embed(tokens))
        loss = plain(model, hidden @ model.head.weight.T, target)
        loss.backward()
        found.append((loss.item(), flat_gradients(model)))
        optimizer.step()
    return found


def flat_gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def assert_same(ours, tolerance=1e-9):
    for (loss, grad), (expected, expected_grad) in zip(ours, two_plain_steps(), strict=True):
        assert loss == pytest.approx(expected, rel=1e-6)
        assert (grad - expected_grad).norm() <= tolerance * expected_grad.norm()


@pytest.mark.parametrize("accumulation", [1, 4])
def test_pytorch(accumulation):
    model, (tokens, target), found = double_model(), data(), []
    batches = list(zip(tokens.chunk(accumulation), target.chunk(accumulation), strict=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        loss = pytorch.accumulate(model, CRITERION, batches).item()
        found.append((loss, flat_gradients(model)))
        optimizer.step()
    assert_same(found)


def test_pytorch_learns():
    losses = pytorch.main(steps=20)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:pytorch_lightning")
@pytest.mark.filterwarnings("ignore::FutureWarning:pytorch_lightning")
@pytest.mark.parametrize("accumulation", [1, 4])
def test_lightning(accumulation):
    pl = pytest.importorskip("pytorch_lightning")
    from segloss.integrations.examples.lightning import LossModule, main

    found = []

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            found.append([None, flat_gradients(module)])

        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            found[-1][0] = trainer.callback_metrics["loss"].item()

    module = LossModule(double_model(), CRITERION, accumulation)
    dataset = torch.utils.data.TensorDataset(*data())
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False, callbacks=[Watch()],
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(dataset, batch_size=8))
    assert_same(found)
    assert main(steps=10, accumulation=accumulation) < 5.0


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_preferences(name):
    pytest.importorskip("trl")
    from segloss.integrations.examples import preferences

    losses = [line["loss"] for line in getattr(preferences, name)(steps=15)]
    assert losses[0] == pytest.approx(0.6931 if name == "dpo" else 0.5, abs=1e-3)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_reinforcement(name):
    """The share of even words rises above that of chance."""
    pytest.importorskip("trl")
    from segloss.integrations.examples import preferences

    rewards = [line["reward"] for line in getattr(preferences, name)(steps=25)]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.15

"""A tiny model, a few sequences, and what training on full logits in plain PyTorch does to it."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import segloss
from segloss import reference

V = 61
LR = 0.5


def tiny_model(**options):
    """A Llama in float64, the same each time: accumulation then differs by rounding only."""
    from exact_llama import exact
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
    return exact(LlamaForCausalLM(LlamaConfig(**sizes, **heads, **options)).double())


def tiny_rows(count: int = 8) -> list[dict]:
    """Sequences of one length, their prompts of several: micro-batches with unequal tokens."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(1, V, (count, 9), generator=generator)
    prompt = torch.tensor([[1], [6], [3], [4], [7], [2], [5], [5]])[:count]
    labels = rows.masked_fill(torch.arange(9) < prompt, -100)
    return [
        {"input_ids": x.tolist(), "labels": y.tolist(), "task_ids": i % 3}
        for i, (x, y) in enumerate(zip(rows, labels, strict=True))
    ]


def plain_batch(rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """(input ids, next tokens), both (B, T)."""
    ids, labels = (torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels"))
    return ids, F.pad(labels, (0, 1), value=-100)[:, 1:]


def token_nll(logits, target):
    """(B, T) cross-entropy, 0 where there is none."""
    return F.cross_entropy(logits.transpose(1, 2), target, reduction="none", ignore_index=-100)


def plain_cross_entropy(logits, target):
    return token_nll(logits, target).sum() / (target != -100).sum()


def plain_focal(logits, target):
    nll = token_nll(logits, target)
    return ((1 - torch.exp(-nll)) ** 2 * nll).sum() / (target != -100).sum()


def plain_with_lovasz(logits, target):
    """0.6 cross-entropy + 0.4 Lovász-Softmax, the latter by sorting every column."""
    lovasz = reference.lovasz_softmax(logits, target)
    return 0.6 * plain_cross_entropy(logits, target) + 0.4 * lovasz


# ours, and the same on full logits
PAIRS = {
    "cross-entropy": (segloss.CrossEntropyLoss(), plain_cross_entropy),
    "focal": (segloss.FocalLoss(), plain_focal),
    "0.6 ce + 0.4 lovasz": (
        0.6 * segloss.CrossEntropyLoss() + 0.4 * segloss.LovaszSoftmaxLoss(),
        plain_with_lovasz,
    ),
}


def quantisable(dtype=torch.float32):
    """A Llama whose head is as wide as the blocks that quantised weights are cut into."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 128, "intermediate_size": 24}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, **heads, pad_token_id=0, tie_word_embeddings=False)
    return LlamaForCausalLM(config).to(dtype)


def assert_losses_are_of_its_logits(model) -> None:
    """`head_loss` and `fuse_loss` of a head of any kind, values and gradients."""
    from segloss.integrations.transformers import fuse_loss, head_loss, next_tokens

    ids = torch.randint(1, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    for loss in (segloss.CrossEntropyLoss(), segloss.LovaszSoftmaxLoss()):
        true = loss(model(input_ids=ids).logits, next_tokens(ids))
        expected = gradients_of(model, true)
        ours = head_loss(model, loss, next_tokens(ids), input_ids=ids)[0]
        found = gradients_of(model, ours)
        fused = fuse_loss(model, loss)
        again = model(input_ids=ids, labels=ids).loss
        fused.remove()
        assert ours.item() == pytest.approx(true.item(), rel=1e-6)
        assert again.item() == pytest.approx(true.item(), rel=1e-6)
        assert found.keys() == expected.keys()
        for name, grad in expected.items():
            assert (found[name] - grad).norm() <= 2e-6 * grad.norm(), name


def gradients_of(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone().float() for n, p in model.named_parameters() if p.grad is not None}


def gradients(model) -> torch.Tensor:
    parts = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
    return torch.cat(parts).clone()


def plain_training(model, rows: list[dict], loss, steps: int = 2, before_step=None):
    """[(loss, gradients)] of steps of SGD over consecutive parts of the rows."""
    found = []
    size = len(rows) // steps
    for step in range(steps):
        model.zero_grad()
        ids, target = plain_batch(rows[step * size : (step + 1) * size])
        value = loss(model(input_ids=ids).logits, target)
        value.backward()
        found.append((value.item(), gradients(model)))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter -= LR * parameter.grad
    return found


def training_arguments(folder, accumulation: int = 1, arguments_class=None, **options):
    """Two steps of plain SGD over eight rows, in their order: four a step, over all processes."""
    from transformers import TrainingArguments

    processes = dist.get_world_size() if dist.is_initialized() else 1

    settings = {
        "max_steps": 2,
        "per_device_train_batch_size": 4 // accumulation // processes,
        "gradient_accumulation_steps": accumulation,
        "per_device_eval_batch_size": 4,
        "train_sampling_strategy": "sequential",
        "learning_rate": LR,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    arguments_class = arguments_class or TrainingArguments
    if "train_sampling_strategy" not in arguments_class.__dataclass_fields__:
        del settings["train_sampling_strategy"]  # `in_order`
    return arguments_class(str(folder), **(settings | options))


def in_order(trainer):
    """A trainer that takes its rows in their order and does not divide twice by the number of
    micro-batches, in releases of transformers that would."""
    if not hasattr(trainer.args, "train_sampling_strategy"):
        sampler = torch.utils.data.SequentialSampler
        trainer._get_train_sampler = lambda *given: sampler(trainer.train_dataset)
    trainer.accelerator.gradient_accumulation_steps = 1
    return trainer


def watch(trainer) -> list:
    """Train; [(loss, gradients)] of every step."""
    from transformers import TrainerCallback

    found: list = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            found.append([None, gradients(model)])

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                found[-1][0] = logs["loss"]

    trainer.add_callback(Watch())
    trainer.train()
    return found


def logged(loss: float, rel: float = 1e-6):
    """What stands for a loss in the log, which older releases of transformers round."""
    import transformers

    rounded = "round(" in inspect.getsource(transformers.Trainer._maybe_log_save_evaluate)
    return pytest.approx(loss, rel=rel, abs=6e-5 if rounded else 0)


def assert_same_steps(ours, theirs, tolerance: float = 1e-9):
    """The losses too, which a Trainer sums up in float32."""
    assert len(ours) == len(theirs) == 2
    for (value, grad), (expected, expected_grad) in zip(ours, theirs, strict=True):
        assert value == logged(expected)
        error = (grad - expected_grad).norm() / expected_grad.norm()
        assert error <= tolerance


# --------------------------------------------------------------- weights of tasks and samples


def weighed(weights):
    """The plain loss under token weights (B, T) of each step, which makes them from its nll."""

    def loss(logits, target):
        nll = token_nll(logits, target)
        return (weights(nll.detach(), target != -100) * nll).sum()

    return loss


def sample_means(nll, valid):
    return (nll * valid).sum(1) / valid.sum(1)


def irdro(temperature):
    def weights(nll, valid):
        share = torch.softmax(sample_means(nll, valid) / temperature, 0) / valid.sum(1)
        return share[:, None] * valid

    return weights


TASK_WEIGHTS = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)


def by_task(step_rows, omega, share=None):
    """Token weights omega_i / (tokens of task i), or samples' shares within their task."""
    task = torch.tensor([row["task_ids"] for row in step_rows])

    def weights(nll, valid):
        n = valid.sum(1).double()
        per_sample = n if share is None else torch.softmax(sample_means(nll, valid) / share, 0)
        total = torch.stack([per_sample[task == i].sum() for i in range(3)])
        return (omega[task] * per_sample / (n * total[task]))[:, None] * valid

    return weights


def validation_batches():
    rows = tiny_rows()[2:8]
    for part in (rows[:2], rows[2:4], rows[4:]):
        yield {key: torch.tensor([row[key] for row in part]) for key in part[0]}


def coba(group=None):
    return segloss.CoBa(3, warmup=1, history=3, group=group)


def losses_of(model, batches):
    """(cross-entropy per token of each task (3,), tokens (3,)), on full logits."""
    totals = torch.zeros(2, 3, dtype=torch.float64)
    for batch in batches:
        ids, labels = batch["input_ids"], batch["labels"]
        target = F.pad(labels, (0, 1), value=-100)[:, 1:]
        nll = token_nll(model(input_ids=ids).logits, target).detach()
        for i, task in enumerate(batch["task_ids"]):
            totals[:, task] += torch.stack([nll[i].sum(), (target[i] != -100).sum()])
    return totals[0] / totals[1], totals[1]

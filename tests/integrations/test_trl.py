"""TRL's `SFTTrainer` with our losses, against plain PyTorch on full logits and TRL's own losses."""

import pytest
import torch
from integration_helpers import (
    PAIRS,
    V,
    assert_same_steps,
    in_order,
    logged,
    plain_batch,
    plain_training,
    tiny_model,
    tiny_rows,
    token_nll,
    training_arguments,
    watch,
)

import segloss

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
from segloss.integrations.trl import SFTTrainer  # noqa: E402  (needs trl)

pytestmark = pytest.mark.filterwarnings(
    "ignore:'pin_memory' argument is set as true:UserWarning",
    "ignore:`is_gradient_checkpointing`:FutureWarning",  # of peft
    "ignore:`gradient_checkpointing`:FutureWarning",  # of trl's own settings
)


def tokenizer():
    """One word per id."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"[pad]": 0, "[eos]": 1, **{f"w{i}": i for i in range(2, V)}}
    made = Tokenizer(models.WordLevel(words, unk_token="[pad]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[pad]", eos_token="[eos]")


def trainer(folder, model=None, accumulation=1, rows=None, trainer_class=SFTTrainer, **options):
    names = {
        "loss_type",
        "packing",
        "padding_free",
        "max_length",
        "max_steps",
        "dataset_kwargs",
        "shuffle_dataset",
    }
    arguments = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    arguments |= {key: options.pop(key) for key in names & options.keys()}
    made = trainer_class(
        model=tiny_model() if model is None else model,
        args=training_arguments(folder, accumulation, trl.SFTConfig, bf16=False, **arguments),
        train_dataset=datasets.Dataset.from_list(tiny_rows() if rows is None else rows),
        processing_class=tokenizer(),
        **options,
    )
    return in_order(made)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("name", ["cross-entropy", "focal"])
def test_token_losses(name, accumulation, tmp_path):
    ours, plain = PAIRS[name]
    found = watch(trainer(tmp_path, None, accumulation, loss=ours))
    assert_same_steps(found, plain_training(tiny_model(), tiny_rows(), plain))


def test_combined_with_a_region_loss(tmp_path):
    ours, plain = PAIRS["0.6 ce + 0.4 lovasz"]
    found = watch(trainer(tmp_path, loss=ours))
    assert_same_steps(found, plain_training(tiny_model(), tiny_rows(), plain))


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_loss_type(loss_type, accumulation, tmp_path):
    """The config's loss, gradients and logged numbers are TRL's, which sums in float32."""
    found, logs = [], []
    for trainer_class in (SFTTrainer, trl.SFTTrainer):
        options = {"trainer_class": trainer_class, "loss_type": loss_type}
        own = trainer(tmp_path, None, accumulation, **options)
        found.append(watch(own))
        logs.append(own.state.log_history)
    assert_same_steps(*found, tolerance=1e-6)
    for ours, theirs in zip(logs[0][:2], logs[1][:2], strict=True):
        assert ours["num_tokens"] == theirs["num_tokens"]
        if accumulation == 1:
            for name in ("entropy", "mean_token_accuracy"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5)


def test_lora_on_the_head(tmp_path):
    """TRL itself refuses it; here it trains, with the gradients of full logits."""
    import peft

    config = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["q_proj", "lm_head"]}
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        trainer(tmp_path, peft_config=peft.LoraConfig(**config), trainer_class=trl.SFTTrainer)

    def weights(model):
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return model.double()

    ours = trainer(tmp_path, peft_config=peft.LoraConfig(**config), loss=segloss.FocalLoss())
    weights(ours.model)
    plain = weights(peft.get_peft_model(tiny_model(), peft.LoraConfig(**config)))
    assert any("lm_head.lora_A" in name for name, p in plain.named_parameters() if p.requires_grad)
    assert_same_steps(watch(ours), plain_training(plain, tiny_rows(), PAIRS["focal"][1]))


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_weights_reach_the_loss(accumulation, padding_free, tmp_path):
    """Task ids through TRL's collator, also where it joins the rows to one."""
    omega = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    options = {"task_weights": omega, "padding_free": padding_free, "max_length": None}
    model = tiny_model(attn_implementation="eager")
    found = watch(trainer(tmp_path, model, accumulation, **options))
    model, expected = tiny_model(attn_implementation="eager"), []
    for start in (0, 4):
        rows = tiny_rows()[start : start + 4]
        task = torch.tensor([row["task_ids"] for row in rows])

        def loss(logits, target, task=task):
            nll, n = token_nll(logits, target), (target != -100).sum(1)
            return sum(omega[i] * nll[task == i].sum() / n[task == i].sum() for i in task.unique())

        expected += plain_training(model, rows, loss, steps=1)
    assert_same_steps(found, expected, 1e-6)  # Llama's norms and softmax are in float32


def test_from_text(tmp_path):
    """Prompts and completions of several lengths, prepared, collated and padded by TRL."""
    rows = [
        {"prompt": "w2 w3 ", "completion": "w5 w6 w7", "task_ids": 0},
        {"prompt": "w9 ", "completion": "w4", "task_ids": 1},
        {"prompt": "w8 w7 w6 ", "completion": "w5 w4", "task_ids": 1},
        {"prompt": "w3 w2 ", "completion": "w9 w9 w8 w2", "task_ids": 0},
    ]
    ours = trainer(
        tmp_path, None, 2, rows, max_steps=1, dataset_kwargs=None, shuffle_dataset=False,
        task_weights=torch.tensor([0.8, 0.2], dtype=torch.float64),
    )  # fmt: skip
    found = watch(ours)
    model, parts = tiny_model(), [[], []]
    for row in rows:
        prompt, completion = (
            [int(word[1:]) for word in row[key].split()] for key in ("prompt", "completion")
        )
        ids, labels = prompt + completion + [1], [-100] * len(prompt) + completion + [1]
        ids, target = plain_batch([{"input_ids": ids, "labels": labels}])
        parts[row["task_ids"]] += token_nll(model(input_ids=ids).logits, target)[target != -100]
    value = 0.8 * torch.stack(parts[0]).mean() + 0.2 * torch.stack(parts[1]).mean()
    value.backward()
    grad = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert found[0][0] == logged(value.item())
    assert (found[0][1] - grad).norm() <= 1e-9 * grad.norm()


def test_evaluation_logs_the_statistics(tmp_path):
    ours = trainer(tmp_path, eval_dataset=datasets.Dataset.from_list(tiny_rows()[:4]))
    metrics = ours.evaluate()
    ids, target = plain_batch(tiny_rows()[:4])
    log_p = torch.log_softmax(ours.model(input_ids=ids).logits.detach(), -1)
    entropy = -(log_p.exp() * log_p).sum(-1)[target != -100].mean()
    assert metrics["eval_loss"] == pytest.approx(PAIRS["cross-entropy"][1](log_p, target).item())
    assert metrics["eval_entropy"] == pytest.approx(entropy.item())
    assert "eval_mean_token_accuracy" in metrics


def test_two_losses_are_refused(tmp_path):
    with pytest.raises(ValueError, match="loss_type is 'dft' and loss is given"):
        trainer(tmp_path, loss=segloss.FocalLoss(), loss_type="dft")

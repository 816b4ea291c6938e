"""TRL's preference and reinforcement trainers on our head, against TRL's own and full logits."""

import warnings

import pytest
import torch
from integration_helpers import V, tiny_model

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
from integrations.test_trl import tokenizer  # noqa: E402  (needs trl)

from segloss.integrations import trl as ours  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:'pin_memory' argument is set as true:UserWarning",
    "ignore:`is_gradient_checkpointing`:FutureWarning",  # of peft
    "ignore:`gradient_checkpointing`:FutureWarning",  # of trl's own settings
)
FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


# ------------------------------------------------------------------------------ the fused head


def batch():
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(2, V, (3, 7), generator=generator)
    return ids, ids.masked_fill(torch.arange(7) < torch.tensor([[2], [0], [6]]), -100)


def plain_fields(logits, labels, temperature):
    """Every field in float64, on full logits."""
    z, target = logits[:, :-1].double() / temperature, labels[:, 1:]
    mask = target != -100
    log_p = torch.log_softmax(z, -1)
    fields = {
        "log_probs": log_p.gather(-1, target.clamp(min=0)[..., None])[..., 0],
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "log_sum_sq_probs": torch.logsumexp(2 * log_p, -1),
        "mean_logits": z.mean(-1),
        "is_top1": log_p.argmax(-1) == target,
    }
    return {name: value * mask for name, value in fields.items()} | {"label_mask": mask}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_fields(family, temperature):
    from integrations.test_transformers import tiny

    model = tiny_model() if family == "Llama" else tiny(
        "Gemma2", head_dim=8, final_logit_softcapping=3.0, attn_implementation="eager"
    ).double()  # fmt: skip
    ids, labels = batch()
    fields = plain_fields(model(input_ids=ids).logits, labels, temperature)
    expected = torch.autograd.grad(
        (fields["log_probs"].sum() + 0.3 * fields["entropy"].sum()), list(model.parameters())
    )
    ours.add_fused_lm_head(model, temperature, outputs=FIELDS)
    found = model(input_ids=ids, labels=labels, fused_lm_head=True)
    for name, value in fields.items():
        torch.testing.assert_close(getattr(found, name), value, rtol=1e-9, atol=1e-9)
    assert not found.mean_logits.requires_grad
    assert not found.log_sum_sq_probs.requires_grad
    number = fields["label_mask"].sum()
    torch.testing.assert_close(found.loss, -fields["log_probs"].sum() / number)
    grads = torch.autograd.grad(
        found.log_probs.sum() + 0.3 * found.entropy.sum(), list(model.parameters())
    )
    for grad, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-8, atol=1e-12)
    # labels that a context-parallel trainer has shifted, and the divisor of a step
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    again = model(input_ids=ids, shift_labels=shifted, num_items_in_batch=20, fused_lm_head=True)
    torch.testing.assert_close(again.log_probs[:, :-1], found.log_probs)
    torch.testing.assert_close(again.loss, found.loss * number / 20)
    assert model(input_ids=ids).logits.shape == (3, 7, V if family == "Llama" else 97)


def test_router_loss():
    """Of a mixture of experts, beside the numbers per token and within the loss."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, router_aux_loss_coef=0.5))
    ids, labels = batch()
    asked = {"input_ids": ids, "labels": labels, "output_router_logits": True}
    own = model(**asked)
    ours.add_fused_lm_head(model)
    found = model(**asked, fused_lm_head=True)
    torch.testing.assert_close(found.aux_loss, own.aux_loss)
    torch.testing.assert_close(found.loss, own.loss, rtol=1e-6, atol=0)
    expected = plain_fields(own.logits, labels, 1.0)["log_probs"].float()
    torch.testing.assert_close(found.log_probs, expected, rtol=1e-6, atol=1e-6)
    assert model(input_ids=ids, labels=labels, fused_lm_head=True).aux_loss is None


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_prompt_tuning():
    """peft pads the labels; the last virtual token predicts the first of them."""
    import peft

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(tiny_model(), config).double()
    ids, labels = batch()
    expected = plain_fields(
        model(input_ids=ids).logits, torch.nn.functional.pad(labels, (4, 0), value=-100), 1.0
    )
    ours.add_fused_lm_head(model.get_base_model(), outputs=FIELDS)
    found = model(input_ids=ids, labels=labels, fused_lm_head=True)
    for name, value in expected.items():
        torch.testing.assert_close(getattr(found, name), value, rtol=1e-9, atol=1e-9)


def test_only_what_is_asked_for():
    model, (ids, labels) = tiny_model(), batch()
    ours.add_fused_lm_head(model)
    found = model(input_ids=ids, labels=labels, fused_lm_head=True)
    assert set(found) == {"loss", "log_probs", "label_mask"}
    nothing = model(input_ids=ids, labels=torch.full_like(labels, -100), fused_lm_head=True)
    assert nothing.loss.item() == 0
    nothing.loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    with pytest.raises(ValueError, match="labels are None"):
        model(input_ids=ids, fused_lm_head=True)
    with pytest.raises(ValueError, match=r"temperature is 0\.0; it takes a number above 0"):
        ours.add_fused_lm_head(tiny_model(), 0.0)
    with pytest.raises(ValueError, match="outputs has 'logps'; it takes log_probs, entropy"):
        ours.add_fused_lm_head(tiny_model(), outputs=("logps",))


def test_head_in_float32():
    model, (ids, labels) = tiny_model().bfloat16(), batch()
    model.lm_head.float()
    with torch.no_grad():
        hidden = model.model(input_ids=ids).last_hidden_state
        logits = hidden.float() @ model.lm_head.weight.T
    ours.add_fused_lm_head(model, cast_lm_head_to_fp32=True)
    head = model.lm_head  # as TRL patches it
    head.forward = lambda hidden: torch.nn.functional.linear(hidden.float(), head.weight)
    found = model(input_ids=ids, labels=labels, fused_lm_head=True)
    expected = plain_fields(logits, labels, 1.0)["log_probs"].float()
    torch.testing.assert_close(found.log_probs, expected, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------- the trainers


def words(*ids):
    return " ".join(f"w{i}" for i in ids)


PAIRS = [
    {"prompt": words(3, 4), "chosen": f" {words(5, 6, 7)}", "rejected": f" {words(9, 8)}"},
    {"prompt": words(9), "chosen": f" {words(4)}", "rejected": f" {words(6, 6, 6)}"},
    {"prompt": words(8, 7), "chosen": f" {words(2, 3)}", "rejected": f" {words(5)}"},
    {"prompt": words(5), "chosen": f" {words(7, 9, 2)}", "rejected": f" {words(3, 4)}"},
]
SINGLE = [
    {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
    for row in PAIRS
    for side in ("chosen", "rejected")
]
CASES = {
    "dpo": ("DPO", {}, PAIRS),
    "dpo and sft": ("DPO", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 0.5]}, PAIRS),
    "wpo": ("DPO", {"use_weighting": True}, PAIRS),
    "dpo, reference beforehand": ("DPO", {"precompute_ref_log_probs": True}, PAIRS),
    "kto": ("KTO", {}, SINGLE),
    "grpo": ("GRPO", {"temperature": 0.8, "beta": 0.1, "entropy_coef": 0.1}, PAIRS),
    "rloo": ("RLOO", {"temperature": 1.2, "beta": 0.1}, PAIRS),
}  # fmt: skip


def reward(completions, **kwargs):
    return [float(sum(int(word[1:]) for word in text.split()) % 7) for text in completions]


def train(namespace, name, folder, **more):
    """(gradients, logs) of two steps."""
    from transformers import LlamaForCausalLM, TrainerCallback

    kind, options, rows = CASES[name]
    config_class = getattr(trl, f"{kind}Config")
    known = config_class.__dataclass_fields__
    options = {key: value for key, value in options.items() if key in known}
    if kind in ("GRPO", "RLOO"):
        rows = [{"prompt": row["prompt"]} for row in rows]
        options |= {"num_generations": 2, "max_completion_length": 4}
        more["reward_funcs"] = reward
    arguments = config_class(
        str(folder), max_steps=2, per_device_train_batch_size=4, learning_rate=0.5, optim="sgd",
        lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=1, save_strategy="no",
        use_cpu=True, report_to=[], disable_tqdm=True, bf16=False, seed=0,
        gradient_checkpointing=False, **options,
    )  # fmt: skip
    found: list = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            found.append(torch.cat(grads).clone())

    # in a folder, where some trainers look for the reference
    tiny_model(eos_token_id=1).float().save_pretrained(folder / "model")
    model = LlamaForCausalLM.from_pretrained(folder / "model")
    torch.manual_seed(0)
    if kind not in ("GRPO", "RLOO") and "peft_config" not in more:
        more["ref_model"] = tiny_model().float()
        with torch.no_grad():
            more["ref_model"].lm_head.weight.mul_(0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library
        trainer = getattr(namespace, f"{kind}Trainer")(
            model=model, args=arguments, train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer(),
            callbacks=[Watch()], **more,
        )  # fmt: skip
        trainer.train()
    return found, trainer.state.log_history[:2]


@pytest.mark.parametrize("name", CASES)
def test_trainers(name, tmp_path):
    """Losses, gradients and what is logged are those of TRL's own head."""
    grads, logs = train(ours, name, tmp_path / "ours")
    expected, expected_logs = train(trl, name, tmp_path / "theirs")
    assert len(grads) == len(expected) == 2
    for grad, other in zip(grads, expected, strict=True):
        assert other.norm() > 0
        assert (grad - other).norm() <= 1e-4 * other.norm()
    timed = ("time", "runtime", "second")
    for line, other in zip(logs, expected_logs, strict=True):
        for key, value in other.items():
            if not any(part in key for part in timed):
                assert line[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key


def test_lora_on_the_head(tmp_path):
    """TRL refuses it; here the reference is the model with its adapters off."""
    import peft

    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        train(trl, "dpo", tmp_path / "theirs", peft_config=config)
    grads, logs = train(ours, "dpo", tmp_path / "ours", peft_config=config)
    assert logs[0]["loss"] == pytest.approx(0.6931, abs=1e-4)  # log 2: policy and reference agree
    assert logs[1]["loss"] < 0.69
    assert all(grad.norm() > 0 for grad in grads)

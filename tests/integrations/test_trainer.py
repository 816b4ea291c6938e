"""Losses in transformers' own `Trainer`, against plain PyTorch on full logits."""

import math

import pytest
import torch
from integration_helpers import (
    PAIRS,
    TASK_WEIGHTS,
    V,
    assert_same_steps,
    by_task,
    coba,
    gradients,
    in_order,
    irdro,
    logged,
    losses_of,
    plain_batch,
    plain_cross_entropy,
    plain_training,
    tiny_model,
    tiny_rows,
    token_nll,
    training_arguments,
    validation_batches,
    watch,
    weighed,
)

import segloss

transformers = pytest.importorskip("transformers")
from segloss.integrations.transformers import (  # noqa: E402  (needs transformers)
    CoBaCallback,
    LossMixin,
    compute_loss_func,
    set_loss_function,
)

# of the libraries, on a machine without an accelerator
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")


class LossTrainer(LossMixin, transformers.Trainer):
    pass


def trainer(tmp_path, model=None, accumulation=1, trainer_class=LossTrainer, rows=None, **options):
    names = {"remove_unused_columns", "save_strategy", "save_steps", "max_steps", "bf16"}
    names |= {"metric_for_best_model", "eval_strategy", "eval_steps", "label_smoothing_factor"}
    arguments = {key: options.pop(key) for key in names & options.keys()}
    made = trainer_class(
        model=tiny_model() if model is None else model,
        args=training_arguments(tmp_path, accumulation, **arguments),
        train_dataset=tiny_rows() if rows is None else rows,
        **options,
    )
    assert (
        trainer_class is transformers.Trainer or made.accelerator.gradient_accumulation_steps == 1
    )
    return in_order(made)


# -------------------------------------------------------------------- loss and gradients


@pytest.mark.parametrize("head", ["fused", "logits"])
@pytest.mark.parametrize("name", PAIRS)
def test_mixin(name, head, tmp_path):
    ours, plain = PAIRS[name]
    found = watch(trainer(tmp_path, loss=ours, head=head))
    assert_same_steps(found, plain_training(tiny_model(), tiny_rows(), plain))


@pytest.mark.parametrize("name", PAIRS)
def test_compute_loss_func(name, tmp_path):
    ours, plain = PAIRS[name]
    options = {"trainer_class": transformers.Trainer, "compute_loss_func": compute_loss_func(ours)}
    found = watch(trainer(tmp_path, rows=without_tasks(), **options))
    assert_same_steps(found, plain_training(tiny_model(), tiny_rows(), plain))


@pytest.mark.parametrize("name", PAIRS)
def test_set_loss_function(name, tmp_path):
    ours, plain = PAIRS[name]
    model = tiny_model()
    set_loss_function(model, ours)
    options = {"trainer_class": transformers.Trainer, "rows": without_tasks()}
    found = watch(trainer(tmp_path, model=model, **options))
    assert_same_steps(found, plain_training(tiny_model(), tiny_rows(), plain))


def without_tasks():
    return [{key: row[key] for key in ("input_ids", "labels")} for row in tiny_rows()]


@pytest.mark.parametrize("name", ["cross-entropy", "focal"])
@pytest.mark.parametrize("way", ["mixin", "compute_loss_func", "set_loss_function"])
def test_accumulation_changes_nothing(name, way, tmp_path):
    """The label counts of the micro-batches differ, so a mean of means would show."""
    ours, plain = PAIRS[name]
    model, options = tiny_model(), {"rows": without_tasks(), "trainer_class": transformers.Trainer}
    if way == "mixin":
        options |= {"trainer_class": LossTrainer, "loss": ours}
    elif way == "compute_loss_func":
        options["compute_loss_func"] = compute_loss_func(ours)
    else:
        set_loss_function(model, ours)
    found = watch(trainer(tmp_path, model=model, accumulation=4, **options))
    assert_same_steps(found, plain_training(tiny_model(), tiny_rows(), plain))


def test_default_is_cross_entropy_with_the_arguments_smoothing(tmp_path):
    arguments = training_arguments(tmp_path, label_smoothing_factor=0.1)
    ours = in_order(LossTrainer(model=tiny_model(), args=arguments, train_dataset=tiny_rows()))

    def smoothed(logits, target):
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), target.flatten(), label_smoothing=0.1
        )

    assert_same_steps(watch(ours), plain_training(tiny_model(), tiny_rows(), smoothed))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # from peft
def test_lora_on_the_head(tmp_path):
    peft = pytest.importorskip("peft")

    def model():
        config = peft.LoraConfig(
            r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "lm_head"]
        )
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny_model(), config).double()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, which would leave A without a gradient
                torch.nn.init.normal_(parameter, std=0.1)
        return model

    found = watch(trainer(tmp_path, model=model(), loss=segloss.FocalLoss()))
    assert_same_steps(found, plain_training(model(), tiny_rows(), PAIRS["focal"][1]))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # from peft
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("head", ["fused", "logits"])
def test_prompt_tuning(head, accumulation, tmp_path):
    """Virtual tokens stand before those of the batch: labels and weights move on with them."""
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    weight = torch.rand(8, 9, generator=torch.Generator().manual_seed(3))
    rows = [row | {"token_weight": weight[i].tolist()} for i, row in enumerate(tiny_rows())]

    def model():
        torch.manual_seed(0)
        return peft.get_peft_model(tiny_model(), config).double()

    found = watch(trainer(tmp_path, model(), accumulation, rows=rows, head=head, max_steps=1))
    plain, (ids, target) = model(), plain_batch(rows[:4])
    nll = token_nll(plain(input_ids=ids).logits[:, 4:], target)
    w = torch.cat([weight[:4, 1:], torch.zeros(4, 1)], 1).double() * (target != -100)
    value = (w * nll).sum() / w.sum()
    value.backward()
    assert found[0][0] == logged(value.item())
    assert (found[0][1] - gradients(plain)).norm() <= 1e-6 * gradients(plain).norm()


def test_router_loss_is_added(tmp_path):
    """A mixture of experts trains as transformers trains it; accumulated, the router losses of the
    micro-batches are averaged."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2,
        output_router_logits=True, router_aux_loss_coef=0.5, pad_token_id=0,
        experts_implementation="eager",  # the grouped one takes no float64
    )  # fmt: skip
    state = transformers.MixtralForCausalLM(config).double().state_dict()

    def model():
        model = transformers.MixtralForCausalLM(config).double()
        model.load_state_dict(state)
        return model

    rows = tiny_rows()
    ours = watch(trainer(tmp_path, model=model()))
    plain = model()
    own = watch(trainer(tmp_path, plain, trainer_class=transformers.Trainer, rows=without_tasks()))
    for (value, grad), (expected, expected_grad) in zip(ours, own, strict=True):
        assert value == logged(expected)
        # transformers' own loss is of float32 logits
        assert (grad - expected_grad).norm() <= 1e-6 * expected_grad.norm()

    plain = model()
    ids, target = plain_batch(rows[:4])
    value = plain_cross_entropy(plain(input_ids=ids).logits, target)
    value += sum(0.5 * plain(input_ids=ids[i : i + 1]).aux_loss for i in range(4)) / 4
    found = watch(trainer(tmp_path, model=model(), accumulation=4))
    assert found[0][0] == logged(value.item())


# --------------------------------------------------------------- weights of tasks and samples


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_sample_weighting(accumulation, tmp_path):
    """IR-DRO over the samples of the whole accumulated batch."""
    weighting = segloss.SampleWeighting("irdro", temperature=0.05)
    ours = trainer(tmp_path, accumulation=accumulation, sample_weights=weighting)
    found = watch(ours)
    assert_same_steps(found, plain_training(tiny_model(), tiny_rows(), weighed(irdro(0.05))))
    assert 1 < ours.state.log_history[0]["effective_sample_size"] < 4


def test_first_pass_has_the_dropout_of_the_second(tmp_path, monkeypatch):
    """Else a sample's weight would be of another network than its gradient."""
    read, trained = [], []
    call = segloss.SampleWeighting.__call__
    monkeypatch.setattr(
        segloss.SampleWeighting,
        "__call__",
        lambda self, losses: call(self, read.append(losses) or losses),
    )
    model = tiny_model(attention_dropout=0.5)
    ours = trainer(tmp_path, model, 2, max_steps=1, sample_weights=segloss.SampleWeighting())

    def record(mode, statistics, target):
        valid = target != -100
        trained.append(-(statistics.log_prob * valid).sum(1) / valid.sum(1))

    ours._record = record
    ours.train()
    torch.testing.assert_close(read[0], torch.cat(trained))


@pytest.mark.parametrize("share", [None, 0.05], ids=["tasks", "tasks and samples"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_task_weights(accumulation, share, tmp_path):
    """With accumulation 4 a micro-batch holds a single task and is still scaled by its weight."""
    weighting = None if share is None else segloss.SampleWeighting("irdro", temperature=share)
    ours = trainer(
        tmp_path, accumulation=accumulation, task_weights=TASK_WEIGHTS, sample_weights=weighting
    )
    found = watch(ours)
    model, expected = tiny_model(), []
    for start in (0, 4):
        rows = tiny_rows()[start : start + 4]
        loss = weighed(by_task(rows, TASK_WEIGHTS, share))
        expected += plain_training(model, rows, loss, steps=1)
    assert_same_steps(found, expected)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_columns_of_weights(accumulation, tmp_path):
    """sample_weights weigh the samples' means, token_weight the tokens' one mean."""
    generator = torch.Generator().manual_seed(3)
    per_sample = torch.rand(8, generator=generator, dtype=torch.float64) + 0.1
    per_token = torch.rand(8, 9, generator=generator, dtype=torch.float64)

    def rows(name, values):
        return [row | {name: values[i].tolist()} for i, row in enumerate(tiny_rows())]

    found = watch(trainer(tmp_path, None, accumulation, rows=rows("sample_weights", per_sample)))
    model, expected = tiny_model(), []
    for part in (slice(0, 4), slice(4, 8)):
        share = per_sample[part] / per_sample[part].sum()
        loss = weighed(lambda nll, valid, w=share: (w / valid.sum(1))[:, None] * valid)
        expected += plain_training(model, tiny_rows()[part], loss, steps=1)
    assert_same_steps(found, expected, 1e-6)  # default_data_collator makes float32 of floats

    found = watch(trainer(tmp_path, None, accumulation, rows=rows("token_weight", per_token)))
    model, expected = tiny_model(), []
    for part in (slice(0, 4), slice(4, 8)):
        # a token's weight stands where the token does, its prediction one place before
        shifted = torch.cat([per_token[part, 1:], torch.zeros(4, 1)], 1)
        loss = weighed(lambda nll, valid, w=shifted: w * valid / (w * valid).sum())
        expected += plain_training(model, tiny_rows()[part], loss, steps=1)
    assert_same_steps(found, expected, 1e-6)


@pytest.mark.parametrize("told_by", ["sample_ids", "position_ids"])
def test_packed_rows(told_by, tmp_path):
    """Two sequences in one row weigh as they do in two, whatever tells them apart."""
    rows = tiny_rows()
    packed = []
    for i, (one, two) in enumerate(zip(rows[::2], rows[1::2], strict=True)):
        row = {key: one[key] + two[key] for key in ("input_ids", "labels")}
        row["labels"][9] = -100  # across the seam
        row["position_ids"] = [*range(9), *range(9)]
        if told_by == "sample_ids":
            row["sample_ids"] = [40 - i] * 9 + [i] * 9
        packed.append(row)
    weighting = segloss.SampleWeighting("irdro", temperature=0.05)
    model = tiny_model(attn_implementation="eager")
    ours = trainer(tmp_path, model, 2, rows=packed, sample_weights=weighting, max_steps=1)
    found = watch(ours)

    plain = tiny_model(attn_implementation="eager")
    ids, target = plain_batch(packed)
    positions = torch.tensor([row["position_ids"] for row in packed])
    logits = plain(input_ids=ids, position_ids=positions, use_cache=False).logits
    split = [x.unflatten(1, (2, 9)).flatten(0, 1) for x in (logits, target)]
    value = weighed(irdro(0.05))(*split)
    value.backward()
    assert found[0][0] == logged(value.item())
    assert (found[0][1] - gradients(plain)).norm() <= 1e-9 * gradients(plain).norm()


# ----------------------------------------------------------------------------------- callbacks


def test_coba_callback(tmp_path):
    """The losses it is told are those of full logits; the weights reach the next step."""
    ours = trainer(tmp_path, task_weights=(balancer := coba()), loss=segloss.CrossEntropyLoss())
    told, used = [], []
    update = balancer.update

    def keep(losses, step, counts):
        told.append((step, losses, counts))
        update(losses, step=step, counts=counts)

    balancer.update = keep
    own = ours._weigh

    def watch_weights(window, losses):
        used.append(balancer.weights())
        return own(window, losses)

    ours._weigh = watch_weights
    ours.add_callback(CoBaCallback(balancer, validation_batches()))
    found = watch(ours)

    model, expected, batches = tiny_model(), [], list(validation_batches())
    mirror = coba()
    for step in range(3):
        losses, counts = losses_of(model, batches if step == 0 else batches[step - 1 : step])
        assert told[step][0] == step
        torch.testing.assert_close(told[step][1], losses, equal_nan=True)
        torch.testing.assert_close(told[step][2], counts)
        mirror.update(losses, step=step, counts=counts)
        if step < 2:
            torch.testing.assert_close(used[step], mirror.weights())
            rows = tiny_rows()[4 * step : 4 * step + 4]
            loss = weighed(by_task(rows, mirror.weights().double()))
            expected += plain_training(model, rows, loss, steps=1)
    assert_same_steps(found, expected)
    assert not torch.allclose(balancer.weights(), torch.full((3,), 1 / 3, dtype=torch.float64))
    logged = [ours.state.log_history[1][f"task_weight_{i}"] for i in range(3)]
    assert logged == pytest.approx(balancer.weights().tolist())


@pytest.mark.parametrize(("accumulation", "dropout"), [(1, 0.0), (2, 0.5)])
def test_resume(accumulation, dropout, tmp_path):
    """CoBa and the burn-in of sample weights go on from the checkpoint, and so does the dropout of
    the pass that reads the losses of an accumulated batch."""

    def run(folder, resume=None, **options):
        balancer, weighting = coba(), segloss.SampleWeighting("irdro", burn_in=1)
        ours = trainer(
            folder, tiny_model(attention_dropout=dropout), accumulation,
            task_weights=balancer, sample_weights=weighting,
            callbacks=[CoBaCallback(balancer, validation_batches())], **options,
        )  # fmt: skip
        ours.train(resume_from_checkpoint=resume)
        return ours.model.lm_head.weight.detach(), balancer.state_dict(), weighting.state_dict()

    whole = run(tmp_path / "whole", save_strategy="steps", save_steps=1)
    again = run(tmp_path / "whole", resume=str(tmp_path / "whole" / "checkpoint-1"))
    torch.testing.assert_close(again[0], whole[0], rtol=0, atol=0)
    assert again[2] == whole[2]
    assert again[1].keys() == whole[1].keys()
    for name, value in whole[1].items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(again[1][name], value, rtol=0, atol=0, equal_nan=True)
        else:
            assert again[1][name] == value


def test_resume_from_a_folder_elsewhere(tmp_path):
    """What is read is what lies in the folder given; a checkpoint without it is refused."""

    def run(folder, resume=None, balanced=True, **options):
        balancer = coba() if balanced else TASK_WEIGHTS
        callbacks = [CoBaCallback(balancer, validation_batches())] if balanced else []
        options |= {"save_strategy": "steps", "save_steps": 1}
        ours = trainer(folder, task_weights=balancer, callbacks=callbacks, **options)
        ours.train(resume_from_checkpoint=resume)
        return ours.model.lm_head.weight.detach()

    whole = run(tmp_path / "whole")
    run(tmp_path / "other", max_steps=1)  # its own checkpoint-1 must not be read
    torch.save({}, tmp_path / "other" / "checkpoint-1" / "coba.pt")
    moved = (tmp_path / "whole" / "checkpoint-1").rename(tmp_path / "moved")
    assert torch.equal(run(tmp_path / "other", moved), whole)

    run(tmp_path / "plain", balanced=False, max_steps=1)
    for place in (True, str(tmp_path / "plain" / "checkpoint-1")):
        with pytest.raises(FileNotFoundError, match=r"checkpoint-1.coba\.pt is missing: the check"):
            run(tmp_path / "plain", place)
    ours = trainer(tmp_path / "new", task_weights=coba(), trainer_class=Forgetful)
    ours.add_callback(CoBaCallback(ours.task_weights, validation_batches()))
    with pytest.raises(FileNotFoundError, match=r"new.checkpoint-1.coba\.pt is missing"):
        ours.train(str(moved))


class Forgetful(LossTrainer):
    """Calls the Trainer's own `train`, as a trainer does that overrides it for itself."""

    def train(self, *args, **kwargs):
        return transformers.Trainer.train(self, *args, **kwargs)


# ---------------------------------------------------------------- statistics and evaluation


def plain_statistics(model, rows):
    """(accuracy, entropy) per token, on full logits."""
    ids, target = plain_batch(rows)
    log_p = torch.log_softmax(model(input_ids=ids).logits.detach(), -1)
    valid = target != -100
    hits = (log_p.argmax(-1) == target)[valid].double().mean()
    entropy = -(log_p.exp() * log_p).sum(-1)[valid].mean()
    return hits.item(), entropy.item()


def test_logged_statistics(tmp_path):
    """Of all tokens since the last line, over micro-batches with unequal tokens."""
    rows = tiny_rows()
    ours = trainer(tmp_path, accumulation=4, max_steps=1)
    hits, entropy = plain_statistics(ours.model, rows[:4])
    ours.train()
    assert ours.state.log_history[0]["mean_token_accuracy"] == pytest.approx(hits)
    assert ours.state.log_history[0]["entropy"] == pytest.approx(entropy)
    ours = trainer(tmp_path, log_statistics=False, max_steps=1)
    ours.train()
    assert "entropy" not in ours.state.log_history[0]


def test_evaluation(tmp_path):
    """The unweighted loss, without logits unless they are asked for."""
    rows = tiny_rows()[:4]
    weighting = segloss.SampleWeighting("irdro", temperature=0.05)
    ours = trainer(tmp_path, sample_weights=weighting, eval_dataset=rows)
    made = []
    ours.model.lm_head.register_forward_hook(lambda m, i, o: made.append(o.shape[1]))
    metrics = ours.evaluate()
    assert made == [8, 1]  # probes, and the last place's
    ids, target = plain_batch(rows)
    logits = ours.model(input_ids=ids).logits
    assert metrics["eval_loss"] == pytest.approx(plain_cross_entropy(logits, target).item())
    hits, entropy = plain_statistics(ours.model, rows)
    assert metrics["eval_entropy"] == pytest.approx(entropy)
    assert metrics["eval_mean_token_accuracy"] == pytest.approx(hits)
    output = ours.predict(rows)
    torch.testing.assert_close(torch.tensor(output.predictions), logits.detach())
    assert output.metrics["test_loss"] == pytest.approx(metrics["eval_loss"])


def test_bfloat16(tmp_path, monkeypatch):
    """Hidden states in bfloat16 and a float32 head: the head's products follow autocast."""
    # older releases of transformers leave it set
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    model = tiny_model().float()
    ours = trainer(tmp_path, model, bf16=True, max_steps=1, callbacks=[
        CoBaCallback(balancer := coba(), validation_batches())
    ])  # fmt: skip
    found = watch(ours)
    plain = plain_training(tiny_model(), tiny_rows(), plain_cross_entropy)
    assert found[0][0] == pytest.approx(plain[0][0], rel=1e-2)
    assert (found[0][1] - plain[0][1]).norm() <= 2e-2 * plain[0][1].norm()
    assert balancer.step == 1


def test_metrics_have_the_prefix_of_their_call(tmp_path):
    """Of several data sets, of `predict`, and of each alone."""
    rows = tiny_rows()
    parts = {"a": rows[:4], "b": rows[4:]}
    ours = trainer(tmp_path, eval_dataset=parts)
    ours.predict(rows)  # leaves nothing to the next
    metrics = ours.evaluate() | ours.evaluate(rows, metric_key_prefix="test")
    metrics |= ours.predict(rows[:4], metric_key_prefix="late").metrics
    for prefix, part in [
        ("eval_a", parts["a"]), ("eval_b", parts["b"]), ("test", rows), ("late", parts["a"])
    ]:  # fmt: skip
        hits, entropy = plain_statistics(ours.model, part)
        ids, target = plain_batch(part)
        nll = plain_cross_entropy(ours.model(input_ids=ids).logits, target).item()
        assert metrics[f"{prefix}_mean_token_accuracy"] == pytest.approx(hits)
        assert metrics[f"{prefix}_entropy"] == pytest.approx(entropy)
        assert metrics[f"{prefix}_nll"] == pytest.approx(nll)
        assert metrics[f"{prefix}_perplexity"] == pytest.approx(math.exp(nll))
    assert "eval_mean_token_accuracy" not in metrics


def test_nll_is_logged_beside_another_loss(tmp_path):
    """The best checkpoint may be chosen by it."""
    rows = tiny_rows()
    ours = trainer(
        tmp_path, loss=segloss.DiceLoss(), eval_dataset=rows, max_steps=1,
        save_strategy="best", metric_for_best_model="eval_nll", eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    ids, target = plain_batch(rows[:4])
    expected = plain_cross_entropy(ours.model(input_ids=ids).logits, target).item()
    ours.train()
    assert ours.state.log_history[0]["nll"] == pytest.approx(expected)
    assert ours.state.log_history[0]["perplexity"] == pytest.approx(math.exp(expected))
    assert ours.state.log_history[0]["loss"] < 1
    assert ours.state.best_metric == ours.state.log_history[1]["eval_nll"]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_gpt2_predicts_one_token_less_than_it_has(accumulation, tmp_path):
    """Its class has no loss_type, for which the Trainer counts the first label."""
    config = transformers.GPT2Config(
        vocab_size=60, n_positions=16, n_embd=16, n_layer=1, n_head=2, attn_pdrop=0.0,
        embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 2
    arguments = training_arguments(
        tmp_path, accumulation, max_steps=1, per_device_train_batch_size=2 // accumulation
    )
    ours = LossTrainer(model, arguments, train_dataset=rows)
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]).item()
    assert ours.evaluate(rows)["eval_loss"] == pytest.approx(expected, rel=1e-5)
    ours.train()
    assert ours.state.log_history[0]["loss"] == logged(expected, 1e-5)


def test_packed_rows_are_counted_as_they_predict(tmp_path):
    """Labels are the input and position_ids start again: the mean is over both samples' tokens."""
    model = tiny_model(attn_implementation="eager")
    ids = torch.randint(2, V, (1, 10))
    positions = torch.tensor([[*range(6), *range(4)]])
    row = {"input_ids": ids[0].tolist(), "labels": ids[0].tolist()}
    row["position_ids"] = positions[0].tolist()
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, :-1]
    target = ids[0, 1:].clone()
    target[5] = -100
    expected = torch.nn.functional.cross_entropy(logits, target).item()
    arguments = training_arguments(tmp_path, max_steps=1, per_device_train_batch_size=1)
    ours = LossTrainer(model, arguments, train_dataset=[row])
    ours.train()
    assert ours.state.log_history[0]["loss"] == logged(expected, 1e-6)


def test_another_ignore_index(tmp_path):
    """Labels, their count and their shift are read by the loss's own."""
    rows = [
        row | {"labels": [0 if label == -100 else label for label in row["labels"]]}
        for row in tiny_rows()
    ]
    loss = segloss.FocalLoss(ignore_index=0)
    found = watch(trainer(tmp_path, None, 4, rows=rows, loss=loss))
    assert_same_steps(found, plain_training(tiny_model(), tiny_rows(), PAIRS["focal"][1]))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_steps_without_a_label(accumulation, tmp_path):
    """Loss 0 and gradients 0; what is a mean over tokens is NaN."""
    rows = [row | {"labels": [-100] * 9} for row in tiny_rows()]
    ours = trainer(tmp_path, None, accumulation, rows=rows, loss=segloss.DiceLoss(), max_steps=1)
    (loss, grads), *_ = watch(ours)
    assert loss == 0
    assert not grads.any()
    assert math.isnan(ours.state.log_history[0]["nll"])


def test_router_loss_by_another_name(tmp_path):
    """Of JetMoe; `test_fuse.py` has more."""
    from integrations.test_fuse import check_router_loss, model_of

    model = model_of("JetMoeForCausalLM")
    ids = torch.randint(3, 60, (2, 9))
    ours = trainer(tmp_path, model)
    model.train()
    own = model(input_ids=ids, labels=ids)
    check_router_loss(
        model, own, lambda: ours.compute_loss(model, {"input_ids": ids, "labels": ids})
    )
    found = ours.compute_loss(model, {"input_ids": ids, "labels": ids})
    torch.testing.assert_close(found, own.loss, rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------------------------------- errors


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="loss has reduction='sum'"):
        trainer(tmp_path, loss=segloss.FocalLoss(reduction="sum"))
    with pytest.raises(TypeError, match=r"task_weights is .*; it takes a CoBa or a tensor \(K,\)"):
        trainer(tmp_path, task_weights=[0.5, 0.5])
    with pytest.raises(ValueError, match=r"task_weights is \[1\.0, -1\.0\]; it takes numbers >= 0"):
        trainer(tmp_path, task_weights=torch.tensor([1.0, -1.0]))
    with pytest.raises(ValueError, match="the batch has the columns input_ids; the loss takes"):
        trainer(tmp_path, rows=[{"input_ids": [1, 2]}] * 4, max_steps=1).train()
    with pytest.raises(TypeError, match="loss is a CrossEntropyLoss; it takes a segloss loss"):
        trainer(tmp_path, loss=torch.nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="head is 'dense'; it takes 'fused' or 'logits'"):
        trainer(tmp_path, head="dense")
    with pytest.raises(ValueError, match="compute_loss_func is given"):
        trainer(tmp_path, compute_loss_func=compute_loss_func(segloss.FocalLoss()))
    with pytest.raises(ValueError, match="task_weights needs the column task_ids"):
        trainer(tmp_path, rows=without_tasks(), task_weights=TASK_WEIGHTS).train()
    with pytest.raises(RuntimeError, match="never updated; add a CoBaCallback"):
        trainer(tmp_path, task_weights=coba()).train()
    with pytest.raises(ValueError, match="batches is empty"):
        CoBaCallback(coba(), [])
    arguments = training_arguments(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match=r"label_smoothing_factor is 0\.1 and loss is given"):
        LossTrainer(
            model=tiny_model(), args=arguments, train_dataset=tiny_rows(), loss=segloss.DFTLoss()
        )
    rows = [row | {"task_ids": [0, 1]} for row in tiny_rows()]
    with pytest.raises(
        ValueError, match=r"task_ids has shape \(2,\) in a row of 9 tokens; it takes"
    ):
        trainer(tmp_path, rows=rows, task_weights=TASK_WEIGHTS).train()


def test_padding_of_packed_rows_says_nothing_of_their_last_sample():
    from segloss.integrations.window import Samples

    labels = torch.tensor([[5, 6, 7, 8, -100, -100]])
    columns = {"task_ids": [[1, 1, 2, 2, 0, 0]], "sample_weights": [[1.0, 1.0, 3.0, 3.0, 0.0, 0.0]]}
    packed = {name: torch.tensor(value) for name, value in columns.items()}
    position_ids = torch.tensor([[0, 1, 0, 1, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    samples = Samples.of(
        {"labels": labels, "position_ids": position_ids, "attention_mask": mask, **packed}
    )
    carries = samples.num_tokens() > 0
    assert samples.task[carries].tolist() == [1, 2]
    assert samples.weight[carries].tolist() == [1.0, 3.0]

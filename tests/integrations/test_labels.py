"""Where labels stand: for causal models one place on, for all others where they are."""

import concurrent.futures
import functools
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from integration_helpers import in_order, logged, training_arguments, watch

import segloss
from segloss import reference

transformers = pytest.importorskip("transformers")
from integrations.test_fuse import SEQ2SEQ, SIZES, model_of  # noqa: E402  (needs transformers)
from integrations.test_trainer import LossTrainer  # noqa: E402

from segloss.integrations.forward import auxiliary_loss  # noqa: E402
from segloss.integrations.labels import shifts_labels  # noqa: E402
from segloss.integrations.transformers import (  # noqa: E402
    CoBaCallback,
    compute_loss_func,
    set_loss_function,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:'pin_memory' argument is set as true:UserWarning",
    "ignore:`is_gradient_checkpointing`:FutureWarning",  # of peft
)
BERT = {
    "vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_labels": 5, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
LOSSES = {
    "cross-entropy": (segloss.CrossEntropyLoss(), lambda z, y: F.cross_entropy(z, y)),
    "focal": (segloss.FocalLoss(), reference.focal_loss),
    "dice": (segloss.DiceLoss(), reference.dice_loss),
}


def bert(kind, **options):
    torch.manual_seed(0)
    config = transformers.BertConfig(**BERT | options)
    return getattr(transformers, f"BertFor{kind}")(config).double()


def data(kind):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 60, (6, 9), generator=generator)
    shape = (6,) if kind == "SequenceClassification" else (6, 9)
    classes = 60 if kind == "MaskedLM" else 5
    labels = torch.randint(classes, shape, generator=generator)
    if labels.dim() > 1:
        labels[:, :2] = -100
    rows = zip(ids.tolist(), labels.tolist(), strict=True)
    return ids, labels, [{"input_ids": x, "labels": y} for x, y in rows]


# ------------------------------------------------------------------------------------ classifiers


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", ["SequenceClassification", "TokenClassification", "MaskedLM"])
@pytest.mark.parametrize("way", ["LossMixin", "LossMixin, logits", "compute_loss_func"])
def test_bert(way, kind, loss, tmp_path):
    """Trained two steps: each label against the logits of its own place."""
    ours, plain = LOSSES[loss]
    model, (ids, labels, rows) = bert(kind), data(kind)
    arguments = training_arguments(tmp_path, per_device_train_batch_size=3)
    if way == "compute_loss_func":
        trainer = transformers.Trainer(
            model, arguments, train_dataset=rows, compute_loss_func=compute_loss_func(ours)
        )
    else:
        head = "logits" if "logits" in way else "fused"
        trainer = LossTrainer(model, arguments, train_dataset=rows, loss=ours, head=head)
    found = watch(in_order(trainer))
    expected = bert(kind)
    for step, (value, grad) in enumerate(found):
        expected.zero_grad()
        part = slice(3 * step, 3 * step + 3)
        logits, target = expected(input_ids=ids[part]).logits, labels[part]
        own = plain(logits[target != -100], target[target != -100])
        own.backward()
        used = [p for p in expected.parameters() if p.grad is not None]
        own_grad = torch.cat([p.grad.flatten() for p in used])
        assert value == logged(own.item(), 1e-5)
        assert grad.norm() == pytest.approx(own_grad.norm().item(), rel=1e-8)
        with torch.no_grad():
            for parameter in used:
                parameter -= 0.5 * parameter.grad


def test_weights_of_rows_of_a_classifier(tmp_path):
    model, (ids, labels, _) = bert("SequenceClassification"), data("SequenceClassification")
    trainer = LossTrainer(model, training_arguments(tmp_path), task_weights=torch.tensor([3.0, 1]))
    model.train()
    batch = {"input_ids": ids, "labels": labels, "task_ids": torch.tensor([0, 0, 1, 1, 1, 1])}
    nll = F.cross_entropy(model(input_ids=ids).logits, labels, reduction="none")
    expected = 3 * nll[:2].mean() + nll[2:].mean()
    torch.testing.assert_close(trainer.compute_loss(model, batch), expected)


def test_evaluation_of_a_classifier(tmp_path):
    """`compute_metrics` gets the logits, and accuracy is that of rows."""
    model, (ids, labels, rows) = bert("SequenceClassification"), data("SequenceClassification")
    seen = []
    trainer = LossTrainer(
        model, training_arguments(tmp_path, per_device_eval_batch_size=6), eval_dataset=rows,
        loss=segloss.FocalLoss(), compute_metrics=lambda p: seen.append(p.predictions) or {},
    )  # fmt: skip
    metrics = trainer.evaluate()
    logits = model(input_ids=ids).logits
    torch.testing.assert_close(torch.tensor(seen[0]), logits.detach())
    expected = reference.focal_loss(logits, labels).item()
    assert metrics["eval_loss"] == pytest.approx(expected)
    assert metrics["eval_nll"] == pytest.approx(F.cross_entropy(logits, labels).item())
    assert metrics["eval_mean_token_accuracy"] == (logits.argmax(-1) == labels).double().mean()


# ------------------------------------------------------------------------------ encoder-decoders


@pytest.mark.parametrize("head", ["fused", "logits"])
@pytest.mark.parametrize(
    "name", ["T5ForConditionalGeneration", "BartForConditionalGeneration", "BartForCausalLM"]
)
def test_own_loss(name, head, tmp_path):
    model = model_of(name)
    ids, labels = torch.randint(3, 60, (2, 7)), torch.randint(3, 60, (2, 9))
    if name == "BartForCausalLM":
        ids = torch.randint(3, 60, (2, 9))
    labels[0, 6:] = -100
    own = model(input_ids=ids, labels=labels).loss
    trainer = LossTrainer(model, training_arguments(tmp_path), head=head)
    found = trainer.compute_loss(model, {"input_ids": ids, "labels": labels})
    torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-6)


def test_whisper(tmp_path):
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        **SEQ2SEQ, num_mel_bins=8, max_source_positions=10, max_target_positions=16,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config)
    batch = {"input_features": torch.randn(2, 8, 20), "labels": torch.randint(3, 60, (2, 9))}
    trainer = LossTrainer(model, training_arguments(tmp_path))
    own = model(**batch).loss
    torch.testing.assert_close(trainer.compute_loss(model, batch), own, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning:transformers")
def test_seq2seq_trainer(tmp_path):
    """Trained, and evaluated by generation, where the Trainer reads the model's own loss."""
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    class Ours(type("Base", (LossTrainer.__bases__[0], Seq2SeqTrainer), {})):
        pass

    model = model_of("T5ForConditionalGeneration").double()
    texts, summaries = torch.randint(3, 60, (4, 7)), torch.randint(3, 60, (4, 5))
    pairs = zip(texts.tolist(), summaries.tolist(), strict=True)
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in pairs]
    arguments = training_arguments(
        tmp_path, 2, Seq2SeqTrainingArguments, predict_with_generate=True,
        max_steps=1,
    )  # fmt: skip
    trainer = Ours(
        model, arguments, train_dataset=rows, eval_dataset=rows, loss=segloss.FocalLoss(),
        compute_metrics=lambda p: {"generated": float(p.predictions.ndim)},
    )  # fmt: skip
    logits = model(input_ids=texts, labels=summaries).logits
    expected = reference.focal_loss(logits, summaries).item()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert metrics["eval_generated"] == 2
    in_order(trainer).train()
    assert trainer.state.log_history[0]["loss"] == logged(expected, 1e-5)


def test_coba_of_an_encoder_decoder(tmp_path):
    model, balancer = model_of("T5ForConditionalGeneration"), segloss.CoBa(1, warmup=1, history=2)
    batch = {
        "input_ids": torch.randint(3, 60, (2, 7)), "labels": torch.randint(3, 60, (2, 5)),
        "task_ids": torch.tensor([0, 0]),
    }  # fmt: skip
    trainer = LossTrainer(model, training_arguments(tmp_path), task_weights=balancer)
    callback = CoBaCallback(balancer, [batch])
    trainer.add_callback(callback)
    callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=model)
    own = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    assert callback.losses.item() == pytest.approx(own.item(), rel=1e-5)


# ---------------------------------------------------------------- found out, given, or refused


@pytest.mark.parametrize(
    ("name", "shifts"),
    [
        ("LlamaForCausalLM", True), ("GPT2LMHeadModel", True), ("BertLMHeadModel", True),
        ("LlavaForConditionalGeneration", True), ("BertForMaskedLM", False),
        ("ModernBertForMaskedLM", False),
        ("T5ForConditionalGeneration", False), ("WhisperForConditionalGeneration", False),
        ("T5GemmaForConditionalGeneration", False), ("LlamaForTokenClassification", False),
        ("LlamaForSequenceClassification", False), ("BertForMultipleChoice", False),
        ("BartForCausalLM", None), ("XLNetLMHeadModel", None),
    ],
)  # fmt: skip
def test_by_class(name, shifts):
    model_class = getattr(transformers, name)
    model = model_class.__new__(model_class)
    torch.nn.Module.__init__(model)
    model.config = model_class.config_class()
    if name == "BartForCausalLM":
        model.config.is_encoder_decoder = False
    model.loss_type = {"T5GemmaForConditionalGeneration": "ForMaskedLM"}.get(name)
    if "For" in name and model.loss_type is None:
        model.loss_type = "For" + name.split("For")[-1]
    assert shifts_labels(model) is shifts


class Own(transformers.PreTrainedModel):
    """A model of one's own, whose loss is of the next tokens, of the same ones, or neither."""

    config_class = transformers.LlamaConfig
    place = 1

    def __init__(self, config):
        super().__init__(config)
        self.embed, self.out = torch.nn.Embedding(60, 16), torch.nn.Linear(16, 60)

    def forward(self, input_ids, labels=None):
        logits, loss = self.out(self.embed(input_ids)), None
        if labels is not None and self.place is not None:
            logit, label = logits[:, : logits.shape[1] - self.place], labels[:, self.place :]
            loss = F.cross_entropy(logit.flatten(0, 1), label.flatten())
        return {"loss": loss, "logits": logits}


@pytest.mark.parametrize("place", [0, 1, 2, None])
def test_a_model_of_one_s_own(place, tmp_path):
    model = Own(transformers.LlamaConfig(**SIZES))
    model.place = place
    ids = torch.randint(3, 60, (2, 9))
    batch = {"input_ids": ids, "labels": ids}
    trainer = LossTrainer(model, training_arguments(tmp_path), head="logits")
    if place in (0, 1):
        own = model(**batch)["loss"]
        torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), own)
        return
    with pytest.raises(ValueError, match="Own does not say whether its labels are the next tokens"):
        trainer.compute_loss(model, dict(batch))
    trainer = LossTrainer(model, training_arguments(tmp_path), head="logits", shift=True)
    logits = model(ids)["logits"]
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), expected)


def test_nothing_is_learnt_of_a_batch_without_labels(tmp_path):
    model = Own(transformers.LlamaConfig(**SIZES))
    model.place = 0
    trainer = LossTrainer(model, training_arguments(tmp_path), head="logits")
    ids = torch.randint(3, 60, (2, 9))
    nothing = {"input_ids": ids, "labels": torch.full_like(ids, -100)}
    assert trainer.compute_loss(model, nothing).item() == 0
    batch = {"input_ids": ids, "labels": ids}
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), model(**batch)["loss"])


# --------------------------------------------------------------------------- compute_loss_func


def called(outputs, labels, model, **options):
    """As a Trainer calls: with the names that it has."""
    inputs: dict = {}
    return compute_loss_func(segloss.CrossEntropyLoss(), **options)(outputs, labels), inputs


def test_compute_loss_func_says_what_it_needs():
    outputs = transformers.modeling_outputs
    model = Own(transformers.LlamaConfig(**SIZES))
    logits, labels = torch.randn(2, 4, 7), torch.randint(7, (2, 4))
    with pytest.raises(ValueError, match="Own does not say whether labels are the next tokens"):
        called(outputs.CausalLMOutput(logits=logits), labels, model)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    found, _ = called(outputs.CausalLMOutput(logits=logits), labels, model, shift=False)
    torch.testing.assert_close(found, expected)
    with pytest.raises(TypeError, match="labels are a NoneType and logits a Tensor"):
        called(outputs.CausalLMOutput(logits=logits), None, model)
    with pytest.raises(ValueError, match="shift is 'yes'; it takes True, False or None"):
        compute_loss_func(segloss.CrossEntropyLoss(), shift="yes")
    with pytest.raises(ValueError, match="loss has reduction='sum'"):
        compute_loss_func(segloss.CrossEntropyLoss(reduction="sum"))
    again = pickle.loads(pickle.dumps(compute_loss_func(segloss.FocalLoss(), shift=False)))
    assert again.shift is False and isinstance(again.loss, segloss.FocalLoss)


@pytest.mark.parametrize(
    "name",
    ["Llama", "GPT2LMHeadModel", "MixtralForCausalLM", "BertForMaskedLM", "prompt"],
)
def test_compute_loss_func_knows_the_model_of_its_trainer(name, tmp_path):
    """Where its labels stand, what its router adds, and how many places are put before them."""
    model = llama() if name in ("Llama", "prompt") else model_of(name)
    if name == "prompt":
        peft = pytest.importorskip("peft")
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        model = peft.get_peft_model(model, config)
    ids = torch.randint(3, 60, (2, 9))
    batch = {"input_ids": ids, "labels": ids}
    found = of_trainer(model, tmp_path)(dict(batch))
    torch.testing.assert_close(found, model(**batch).loss, rtol=1e-5, atol=1e-6)


def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def of_trainer(model, folder, call=None):
    """`compute_loss` of a plain `Trainer` with our cross-entropy."""
    call = call or compute_loss_func(segloss.CrossEntropyLoss())
    trainer = transformers.Trainer(model, training_arguments(folder), compute_loss_func=call)
    model.eval()
    return lambda batch: trainer.compute_loss(model, batch)


@pytest.mark.parametrize("name", ["CpmAntForCausalLM", "BartForCausalLM"])
def test_compute_loss_func_of_a_model_that_does_not_say(name, tmp_path):
    """CPM-Ant's outputs are Llama's, and its labels stand at their places."""
    if name == "BartForCausalLM":
        model = model_of(name)
    else:
        sizes = {"vocab_size": 60, "hidden_size": 16, "dim_ff": 16, "num_hidden_layers": 1}
        config = transformers.CpmAntConfig(num_attention_heads=2, dim_head=8, **sizes)
        model = transformers.CpmAntForCausalLM(config)
    ids = torch.randint(3, 60, (2, 9))
    batch = {"input_ids": ids, "labels": ids}
    with pytest.raises(ValueError, match=f"{name} does not say .* give compute_loss_func shift=Tr"):
        of_trainer(model, tmp_path)(dict(batch))
    loss = segloss.CrossEntropyLoss()
    found = of_trainer(model, tmp_path, compute_loss_func(loss, shift=False))(dict(batch))
    torch.testing.assert_close(found, model(**batch).loss, rtol=1e-5, atol=1e-6)
    trainer = LossTrainer(model, training_arguments(tmp_path))
    model.eval()
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), found)


def test_compute_loss_func_of_an_encoder_decoder(tmp_path):
    """BART's decoder reads the encoder's input where it is given none of its own."""
    model = model_of("BartForConditionalGeneration")
    ids, labels = torch.randint(3, 60, (2, 9)), torch.randint(3, 60, (2, 9))
    batch = {"input_ids": ids, "labels": labels}
    for options in ({}, {"shift": False}):
        call = compute_loss_func(segloss.CrossEntropyLoss(), **options)
        call = of_trainer(model, tmp_path, call)
        with pytest.raises(ValueError, match="was given no decoder_input_ids, so its decoder does"):
            call(dict(batch))
        decoder_input_ids = model.prepare_decoder_input_ids_from_labels(labels=labels)
        found = call({**batch, "decoder_input_ids": decoder_input_ids})
        torch.testing.assert_close(found, model(**batch).loss)


def wrapped(call):
    @functools.wraps(call)
    def wrapper(outputs, labels, **keywords):
        return call(outputs, labels, **keywords)

    return wrapper


def as_lambda(call):
    return lambda o, *rest, **keywords: wrapped(call)(o, *rest, **keywords)


def in_a_thread(call):
    def within(*arguments, **keywords):
        with concurrent.futures.ThreadPoolExecutor() as pool:
            return pool.submit(call, *arguments, **keywords).result()

    return within


WRAPPERS = {"plain": lambda call: call, "wrapped": wrapped, "lambda": as_lambda}


@pytest.mark.parametrize("way", WRAPPERS)
def test_compute_loss_func_of_packed_rows(way, tmp_path):
    """What packs them is among the inputs, which a wrapper around the call does not have."""
    model = llama()
    ids = torch.randint(3, 60, (1, 9))
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    call = WRAPPERS[way](compute_loss_func(segloss.CrossEntropyLoss(), shift=True))
    call = of_trainer(model, tmp_path, call)
    found = call({"input_ids": ids, "labels": ids, "position_ids": places})
    logits = model(input_ids=ids, position_ids=places).logits
    kept = [0, 1, 2, 4, 5, 6, 7]
    expected = F.cross_entropy(logits[0, kept], ids[0, [place + 1 for place in kept]])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("way", ["no trainer", "in a thread", "other outputs"])
def test_compute_loss_func_where_nobody_has_the_inputs(way, tmp_path):
    """Without them it would take the seams of packed rows for next tokens."""
    model, ids = llama(), torch.randint(3, 60, (2, 9))
    call = compute_loss_func(segloss.CrossEntropyLoss(), shift=True)
    with pytest.raises(TypeError, match=r"nobody who called has .*: loss\(outputs\."):
        if way == "no trainer":
            call(model(input_ids=ids), ids)
        elif way == "in a thread":
            of_trainer(model, tmp_path, in_a_thread(call))({"input_ids": ids, "labels": ids})
        else:
            other = lambda o, labels, **k: call({"logits": o.logits * 2}, labels, **k)  # noqa: E731
            of_trainer(model, tmp_path, other)({"input_ids": ids, "labels": ids})


def test_compute_loss_func_of_weighed_tokens(tmp_path):
    """A Llama lets the column pass, where the Trainer does."""
    model, ids, weight = llama(), torch.randint(3, 60, (2, 9)), torch.rand(2, 9)
    call = of_trainer(model, tmp_path)
    batch = {"input_ids": ids, "labels": ids, "token_weight": weight}
    nll = F.cross_entropy(
        model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    expected = (weight[:, 1:].flatten() * nll).sum() / weight[:, 1:].sum()
    torch.testing.assert_close(call(dict(batch)), expected)
    with pytest.raises(TypeError, match=r"the batch has sample_weights, .* or token_weight"):
        call({**batch, "sample_weights": torch.ones(2)})


def test_compute_loss_func_beside_label_smoothing(tmp_path):
    """A Trainer that has both smooths nothing, and says nothing."""
    model, ids = llama(), torch.randint(3, 60, (2, 9))
    arguments = training_arguments(tmp_path, label_smoothing_factor=0.1)
    call = compute_loss_func(segloss.CrossEntropyLoss())
    trainer = transformers.Trainer(model, arguments, compute_loss_func=call)
    with pytest.raises(ValueError, match="with which a Trainer smooths nothing; set it to 0 and"):
        trainer.compute_loss(model, {"input_ids": ids, "labels": ids})


def test_an_auxiliary_loss_without_a_factor():
    config = transformers.LlamaConfig(**SIZES)
    outputs = SimpleNamespace(aux_loss=torch.tensor(2.0))
    with pytest.raises(ValueError, match="Own returns aux_loss, of which neither it nor its conf"):
        auxiliary_loss(Own(config), outputs)
    config.router_aux_loss_coef = 0.25
    assert auxiliary_loss(Own(config), outputs).item() == 0.5
    assert auxiliary_loss(Own(config), SimpleNamespace(aux_loss=None)) is None


# --------------------------------------------------------------------------- set_loss_function


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("T5ForConditionalGeneration", None), ("BartForConditionalGeneration", None),
        ("BartForCausalLM", None), ("BertForSequenceClassification", BERT),
        ("BertForTokenClassification", BERT),
        ("XLMWithLMHeadModel", {"vocab_size": 60, "emb_dim": 16, "n_layers": 1, "n_heads": 2}),
    ],
)  # fmt: skip
def test_models_that_never_call_it_are_refused(name, config):
    if config is None:
        model = model_of(name)
    else:
        model_class = getattr(transformers, name)
        model = model_class(model_class.config_class(**config))
    with pytest.raises(TypeError, match=f"{name} computes its loss itself and never calls"):
        set_loss_function(model, segloss.DiceLoss())


class Deaf(transformers.LlamaForCausalLM):
    """Looks like a model that calls its loss function."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        outputs = super().forward(input_ids=input_ids, **kwargs)
        if labels is not None:
            outputs.loss = F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())
        return outputs


def test_a_model_that_does_not_call_it_after_all():
    model = Deaf(transformers.LlamaConfig(**SIZES))
    set_loss_function(model, segloss.DiceLoss())
    ids = torch.randint(3, 60, (2, 9))
    model(input_ids=ids)
    with pytest.raises(TypeError, match="Deaf computes its loss itself"):
        model(input_ids=ids, labels=ids)


@pytest.mark.parametrize("kind", ["SequenceClassification", "TokenClassification"])
def test_classifiers_that_call_it(kind):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_labels=5)
    model = getattr(transformers, f"LlamaFor{kind}")(config).eval()
    ids, labels, _ = data(kind)
    ids = ids[: len(labels)]
    set_loss_function(model, segloss.FocalLoss())
    outputs = model(input_ids=ids, labels=labels)
    valid = labels != -100
    expected = reference.focal_loss(outputs.logits[valid], labels[valid])
    torch.testing.assert_close(outputs.loss, expected.to(outputs.loss.dtype))
    set_loss_function(model, segloss.DiceLoss())  # in the place of the first
    found = model(input_ids=ids, labels=labels).loss
    expected = reference.dice_loss(outputs.logits[valid], labels[valid])
    torch.testing.assert_close(found, expected.to(found.dtype))


def test_kinds_of_labels_that_are_no_classes():
    config = transformers.LlamaConfig(**SIZES, num_labels=5, problem_type="regression")
    model = transformers.LlamaForSequenceClassification(config)
    set_loss_function(model, segloss.FocalLoss())
    with pytest.raises(ValueError, match="problem_type 'regression'; the loss takes one class per"):
        model(input_ids=torch.randint(3, 60, (2, 9)), labels=torch.randn(2, 5))
    questions = transformers.LlamaForQuestionAnswering(transformers.LlamaConfig(**SIZES))
    with pytest.raises(TypeError, match="ForQuestionAnswering"):
        set_loss_function(questions, segloss.FocalLoss())


@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
def test_labels_that_are_no_classes(kind, tmp_path):
    sizes = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = transformers.BertConfig(
        num_attention_heads=2, num_labels=3, problem_type=kind, **sizes
    )
    model = transformers.BertForSequenceClassification(config)
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    batch = {"input_ids": torch.randint(3, 60, (2, 9)), "labels": labels}
    ours = LossTrainer(model, training_arguments(tmp_path))
    theirs = transformers.Trainer(
        model,
        training_arguments(tmp_path),
        compute_loss_func=compute_loss_func(segloss.CrossEntropyLoss()),
    )
    for trainer in (ours, theirs):
        with pytest.raises(TypeError, match=r"labels are a torch.float32 tensor .* keeps its own"):
            trainer.compute_loss(model, dict(batch))


def test_a_classifier_of_rows_that_is_an_encoder_decoder(tmp_path):
    sizes = {"vocab_size": 60, "decoder_layers": 1, "encoder_layers": 1, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16}
    config = transformers.BartConfig(d_model=16, num_labels=5, eos_token_id=2, **sizes, **heads)
    torch.manual_seed(0)
    model = transformers.BartForSequenceClassification(config)
    ids = F.pad(torch.randint(3, 60, (2, 8)), (0, 1), value=2)
    batch = {"input_ids": ids, "labels": torch.tensor([1, 3])}
    trainer = LossTrainer(model, training_arguments(tmp_path))
    model.eval()
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), model(**batch).loss)


def test_a_router_loss_that_is_made_with_labels_alone(tmp_path):
    sizes = {"vocab_size": 60, "d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    layers = {"encoder_layers": 2, "decoder_layers": 2, "num_experts": 4, "decoder_sparse_step": 2}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_sparse_step": 2}
    config = transformers.NllbMoeConfig(
        **sizes, **layers, **heads, decoder_start_token_id=2, output_router_logits=True
    )
    torch.manual_seed(0)
    model = transformers.NllbMoeForConditionalGeneration(config)
    ids = torch.randint(3, 60, (2, 9))
    batch = {"input_ids": ids, "labels": ids}
    trainer = LossTrainer(model, training_arguments(tmp_path))
    model.eval()
    with pytest.raises(ValueError, match="returned its router's logits and, without labels, no"):
        trainer.compute_loss(model, dict(batch))
    model.config.output_router_logits = False
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), model(**batch).loss)


# ------------------------------------------------------- losses that a model makes beside its own


@pytest.mark.parametrize("head", ["fused", "logits"])
@pytest.mark.parametrize("name", ["ProphetNetForConditionalGeneration", "ProphetNetForCausalLM"])
def test_several_streams_of_logits(name, head, tmp_path):
    """ProphetNet is trained on the tokens after the next as well."""
    model = prophetnet(name)
    ids = torch.randint(3, 60, (2, 9))
    batch = {"input_ids": ids, "labels": ids}
    trainer = LossTrainer(model, training_arguments(tmp_path), head=head)
    model.eval()
    with pytest.raises(ValueError, match="trained on 2 streams of logits, of which the loss would"):
        trainer.compute_loss(model, dict(batch))
    model.disable_ngram_loss = True
    if head == "fused":
        with pytest.raises(
            ValueError, match=r"\(2, 2, 9\) places; .* or give the loss model\(...\)"
        ):
            trainer.compute_loss(model, dict(batch))
    else:
        torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), model(**batch).loss)


def prophetnet(name):
    sizes = {"vocab_size": 60, "hidden_size": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    layers = {"num_encoder_layers": 1, "num_decoder_layers": 1, "num_buckets": 8}
    heads = {"num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2}
    config = transformers.ProphetNetConfig(**sizes, **layers, **heads, decoder_start_token_id=1)
    torch.manual_seed(0)
    return getattr(transformers, name)(config)


class WithAnother(transformers.LlamaForCausalLM):
    """As some models of pictures: another input has a loss of its own."""

    def forward(self, input_ids, labels=None, score=None, **keywords):
        outputs = super().forward(input_ids=input_ids, labels=labels, **keywords)
        if score is not None:
            outputs.loss = score.square().mean() + (outputs.loss or 0)
        return outputs


@pytest.mark.parametrize("way", ["fused", "logits", "compute_loss_func"])
def test_a_loss_of_another_input_is_not_left_out(way, tmp_path):
    torch.manual_seed(0)
    model = WithAnother(transformers.LlamaConfig(**SIZES))
    ids = torch.randint(3, 60, (2, 9))
    if way == "compute_loss_func":
        call = compute_loss_func(segloss.CrossEntropyLoss(), shift=True)
        call = of_trainer(model, tmp_path, call)
    else:
        call = LossTrainer(model, training_arguments(tmp_path), head=way, shift=True).compute_loss
        call = functools.partial(call, model)
    with pytest.raises(TypeError, match="WithAnother returned a loss of its own without labels"):
        call({"input_ids": ids, "labels": ids, "score": torch.ones(2)})
    expected = model(input_ids=ids, labels=ids).loss
    found = call({"input_ids": ids, "labels": ids})
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_loss_of_a_second_decoder():
    outputs = SimpleNamespace(depth_loss=torch.tensor(2.0))
    with pytest.raises(ValueError, match="returned depth_loss, of a second decoder"):
        auxiliary_loss(Own(transformers.LlamaConfig(**SIZES)), outputs)

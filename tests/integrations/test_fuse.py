"""`fuse_loss`: the loss of a model under any trainer, against plain PyTorch on full logits."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from integration_helpers import (
    PAIRS,
    V,
    assert_same_steps,
    gradients,
    logged,
    plain_batch,
    plain_cross_entropy,
    plain_training,
    tiny_model,
    tiny_rows,
    token_nll,
    training_arguments,
    watch,
)
from torch.utils._pytree import tree_leaves

import segloss

transformers = pytest.importorskip("transformers")
from integrations.test_trainer import trainer, without_tasks  # noqa: E402  (needs transformers)

from segloss.integrations.transformers import fuse_loss, set_loss_function  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:'pin_memory' argument is set as true:UserWarning",
    "ignore:`is_gradient_checkpointing`:FutureWarning",  # of peft
    "ignore:`gradient_checkpointing`:FutureWarning",  # of trl's own settings
)


def batch(count=4):
    rows = tiny_rows()[:count]
    return {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")}


def truth(plain, **inputs):
    """(loss, gradients) of full logits."""
    model, (ids, target) = tiny_model(), plain_batch(tiny_rows()[:4])
    value = plain(model(input_ids=ids, **inputs).logits, target)
    value.backward()
    return value, gradients(model)


@pytest.mark.parametrize("name", PAIRS)
def test_loss_and_gradients(name):
    ours, plain = PAIRS[name]
    value, grads = truth(plain)
    model, made = tiny_model(), []  # what the head's forward returns
    model.lm_head.register_forward_hook(lambda m, i, o: made.extend(tree_leaves(o)))
    fuse_loss(model, ours)
    outputs = model(**batch())
    outputs.loss.backward()
    assert outputs.logits is None
    rows = [made.shape[1] for made in made if made.dim() == 3]
    assert rows == [8, 1]  # probes of the first call; the last place
    torch.testing.assert_close(outputs.loss, value)
    torch.testing.assert_close(gradients(model), grads)


@pytest.mark.parametrize(
    ("name", "accumulation"), [*[(name, 1) for name in PAIRS], ("cross-entropy", 4), ("focal", 4)]
)
def test_under_trainer(name, accumulation, tmp_path):
    """A token loss is that of the whole accumulated batch."""
    ours, plain = PAIRS[name]
    model = tiny_model()
    fuse_loss(model, ours)
    options = {"trainer_class": transformers.Trainer, "rows": without_tasks()}
    found = watch(trainer(tmp_path, model, accumulation, **options))
    assert_same_steps(found, plain_training(tiny_model(), tiny_rows(), plain))


@pytest.mark.parametrize("takes", [False, True])
def test_a_callable_of_one_s_own(takes, tmp_path):
    """Without an argument `normalizer` its micro-batches' losses are averaged."""

    def mean(source, target):
        return segloss.focal_loss(source, target)

    def of_window(source, target, normalizer=None):
        return segloss.focal_loss(source, target, normalizer=normalizer)

    model = tiny_model()
    fuse_loss(model, of_window if takes else mean)
    options = {"trainer_class": transformers.Trainer, "rows": without_tasks()}
    found = watch(trainer(tmp_path, model, 4, **options))
    plain = PAIRS["focal"][1]

    def of_rows(logits, target):
        if takes:
            return plain(logits, target)
        return sum(plain(logits[i : i + 1], target[i : i + 1]) for i in range(4)) / 4

    assert_same_steps(found, plain_training(tiny_model(), tiny_rows(), of_rows))


def test_evaluation_under_trainer(tmp_path):
    model = tiny_model()
    fuse_loss(model, segloss.FocalLoss())
    options = {"trainer_class": transformers.Trainer, "eval_dataset": without_tasks()[:4]}
    metrics = trainer(tmp_path, model, **options).evaluate()
    assert metrics["eval_loss"] == pytest.approx(truth(PAIRS["focal"][1])[0].item())


def test_arguments_of_the_loss():
    model, inputs = tiny_model(), batch()
    fuse_loss(model, segloss.CrossEntropyLoss())
    ids, target = plain_batch(tiny_rows()[:4])
    nll = token_nll(tiny_model()(input_ids=ids).logits, target)
    torch.testing.assert_close(model(**inputs, num_items_in_batch=7).loss, nll.sum() / 7)
    shifted = model(input_ids=ids, shift_labels=target, num_items_in_batch=torch.tensor(9)).loss
    torch.testing.assert_close(shifted, nll.sum() / 9)
    weight = torch.rand(4, 9, dtype=torch.float64)
    w = F.pad(weight, (0, 1))[:, 1:] * (target != -100)
    weighed = model(**inputs, token_weight=weight).loss
    torch.testing.assert_close(weighed, (w * nll).sum() / w.sum())
    # positional arguments, and outputs that are a tuple
    mask = torch.ones_like(ids)
    loss, *rest = model(ids, mask, labels=inputs["labels"], return_dict=False)
    torch.testing.assert_close(loss, nll.sum() / (target != -100).sum())
    assert rest == []


def test_packed_rows():
    """No place predicts the first token of another sample, and samples are told apart."""
    model = tiny_model(attn_implementation="eager")
    ids = torch.randint(2, V, (1, 10))
    positions = torch.tensor([[*range(6), *range(4)]])
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    target = F.pad(ids, (0, 1), value=-100)[:, 1:].clone()
    target[0, 5] = -100
    sample = torch.tensor([[0] * 6 + [1] * 4])
    loss = segloss.DiceLoss(per_sample=True)
    fuse_loss(model, loss)
    for packing in (
        {"position_ids": positions},
        {"position_ids": positions, "sample_ids": 5 - sample},
    ):
        found = model(input_ids=ids, labels=ids, **packing).loss
        torch.testing.assert_close(found, loss(logits, target, sample_ids=sample))


# ------------------------------------------------------------------ reversible, saved, as before


def test_remove():
    model, inputs = tiny_model(), batch()
    own = model(**inputs)
    keys = set(vars(model))
    handle = fuse_loss(model, segloss.DiceLoss())
    other = fuse_loss(model, segloss.FocalLoss())  # in the place of the first
    assert model.forward is other
    handle.remove()  # again, which does nothing
    assert model(**inputs).logits is None
    other.remove()
    outputs = model(**inputs)
    assert torch.equal(outputs.loss, own.loss)
    assert torch.equal(outputs.logits, own.logits)
    assert set(vars(model)) == keys
    assert not hasattr(model, "accepts_loss_kwargs")


def test_what_it_is_without_labels():
    model, inputs = tiny_model(), batch()
    logits = model(input_ids=inputs["input_ids"]).logits
    answer = model.generate(inputs["input_ids"][:, :4], max_new_tokens=3, do_sample=False)
    before = list(inspect.signature(model.forward).parameters)
    state = model.state_dict().keys()
    fuse_loss(model, segloss.FocalLoss(weight=torch.ones(V, dtype=torch.float64)))
    assert torch.equal(model(input_ids=inputs["input_ids"]).logits, logits)
    again = model.generate(inputs["input_ids"][:, :4], max_new_tokens=3, do_sample=False)
    assert torch.equal(answer, again)
    assert set(inspect.signature(model.forward).parameters) == {
        *before, "token_weight", "sample_ids"
    }  # fmt: skip
    assert model.state_dict().keys() == state


@pytest.mark.parametrize("way", ["torch.save", "pickle", "deepcopy"])
@pytest.mark.parametrize("function", [fuse_loss, set_loss_function])
def test_saved_and_copied(function, way, tmp_path):
    model, inputs = tiny_model(), batch()
    function(model, segloss.FocalLoss())
    if way == "torch.save":
        torch.save(model, tmp_path / "model.pt")
        other = torch.load(tmp_path / "model.pt", weights_only=False)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        other = copy.deepcopy(model)
    expected = truth(PAIRS["focal"][1])[0]
    with torch.no_grad():
        model.lm_head.weight.zero_()  # the other is no part of it
    torch.testing.assert_close(other(**inputs).loss, expected)
    if function is fuse_loss:
        other.forward.remove()
        torch.testing.assert_close(
            other(**inputs).loss, truth(plain_cross_entropy)[0], check_dtype=False
        )


def test_saved_by_transformers(tmp_path):
    model = tiny_model()
    fuse_loss(model, segloss.FocalLoss())
    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(
        again(**batch()).loss, truth(plain_cross_entropy)[0], check_dtype=False
    )


# ----------------------------------------------------------------------------------- the models


def test_peft():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "lm_head"])

    def model():
        torch.manual_seed(0)
        made = peft.get_peft_model(tiny_model(), config)
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return made.double()

    plain, (ids, target) = model(), plain_batch(tiny_rows()[:4])
    value = PAIRS["focal"][1](plain(input_ids=ids).logits, target)
    value.backward()
    fused = model()
    fuse_loss(fused, segloss.FocalLoss())
    outputs = fused(**batch())
    outputs.loss.backward()
    torch.testing.assert_close(outputs.loss, value)
    torch.testing.assert_close(gradients(fused), gradients(plain))


SIZES = {
    "vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
SEQ2SEQ = {
    "vocab_size": 60, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "dropout": 0.0,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32, "decoder_start_token_id": 2, "max_position_embeddings": 64,
}  # fmt: skip
ALIKE = {
    "T5ForConditionalGeneration": {
        "vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2,
        "decoder_start_token_id": 0, "dropout_rate": 0.0,
    },
    "BartForConditionalGeneration": SEQ2SEQ,
    "BartForCausalLM": SEQ2SEQ,  # whose own loss takes the labels where they stand
    "GPT2LMHeadModel": {
        "vocab_size": 60, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2,
        "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
    },
    "BertForMaskedLM": {
        "vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    },
    "MixtralForCausalLM": SIZES | {
        "num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5,
    },
    "JetMoeForCausalLM": {
        "vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 4, "pad_token_id": 0,
        "num_experts_per_tok": 2, "output_router_logits": True, "aux_loss_coef": 0.5,
    },
    "DbrxForCausalLM": {  # some releases build it with experts as wide as the model alone
        "vocab_size": 60, "d_model": 16, "n_heads": 2, "n_layers": 1, "max_seq_len": 32,
        "ffn_config": {
            "ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "moe_loss_weight": 0.5,
        },
        "attn_config": {"kv_n_heads": 1, "rope_theta": 1e4, "clip_qkv": 8.0},
        "output_router_logits": True, "pad_token_id": 0,
    },
    "SwitchTransformersForConditionalGeneration": {
        "vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2,
        "num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
        "num_experts": 2, "expert_capacity": 64, "decoder_start_token_id": 0, "dropout_rate": 0.0,
        "output_router_logits": True, "router_z_loss_coef": 0.3, "router_aux_loss_coef": 0.5,
        "router_jitter_noise": 0.0,
    },
}  # fmt: skip


def model_of(name):
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    config = model_class.config_class(**ALIKE[name])
    if name == "DbrxForCausalLM":  # some releases read it here, others take no such argument
        config.ffn_config.hidden_size = config.d_model
    model = model_class(config).train()
    if name in ("DbrxForCausalLM", "JetMoeForCausalLM"):  # with parameters that are never set
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    if name == "DbrxForCausalLM" and model(torch.tensor([[1]])).router_logits is None:
        model.config.output_router_logits = False  # 5.5 to 5.17 lose them and die of that
    return model


def check_router_loss(model, own, call):
    """JetMoe of transformers 4.57 makes no loss of its router's logits, though its config asks for
    one: refused, and then trained without."""
    if getattr(own, "router_logits", None) is not None and own.aux_loss is None:
        with pytest.raises(ValueError, match="set output_router_logits to False in its config, to"):
            call()
        model.config.output_router_logits = False


@pytest.mark.parametrize("name", ALIKE)
def test_cross_entropy_is_the_model_s_own_loss(name):
    """With its auxiliary losses, and with the labels where the model has them."""
    model = model_of(name)
    inputs = {
        "input_ids": torch.randint(3, 60, (2, 9)), "labels": torch.randint(3, 60, (2, 9)),
    }  # fmt: skip
    inputs["labels"][0, :4] = -100
    own = model(**inputs)
    own.loss.backward()
    grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    fuse_loss(model, segloss.CrossEntropyLoss())
    check_router_loss(model, own, lambda: model(**inputs))
    outputs = model(**inputs)
    outputs.loss.backward()
    torch.testing.assert_close(outputs.loss, own.loss, rtol=1e-5, atol=1e-6)
    for key, grad in grads.items():
        found = dict(model.named_parameters())[key].grad
        assert (found - grad).norm() <= 1e-4 * grad.norm() + 1e-7, key


def test_a_model_that_leaves_its_router_loss_out():
    """Switch with every layer sparse has the number 0 for it, in its own loss too."""
    torch.manual_seed(0)
    name = "SwitchTransformersForConditionalGeneration"
    sizes = ALIKE[name] | {"num_layers": 1, "num_decoder_layers": 1}
    model = getattr(transformers, name)(transformers.SwitchTransformersConfig(**sizes)).train()
    inputs = {"input_ids": torch.randint(3, 60, (2, 9)), "labels": torch.randint(3, 60, (2, 9))}
    own = model(**inputs)
    assert not own.get("encoder_aux_loss") and not own.get("decoder_z_loss")
    fuse_loss(model, segloss.CrossEntropyLoss())
    torch.testing.assert_close(model(**inputs).loss, own.loss, rtol=1e-5, atol=1e-6)


def test_tokens_of_gpt2_are_counted_as_it_predicts_them(tmp_path):
    """Its class has no loss_type, for which the Trainer counts the first label as a target."""
    model = model_of("GPT2LMHeadModel")
    ids = torch.tensor([[5, 6, 7, 8]])
    total = F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="sum").item()
    fuse_loss(model, segloss.CrossEntropyLoss())
    ours = transformers.Trainer(
        model,
        training_arguments(tmp_path, max_steps=1, per_device_train_batch_size=1),
        train_dataset=[{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}],
    )
    ours.train()
    # transformers before 5.15 counts the first label of every model
    number = 3 if hasattr(ours, "_loss_shifts_labels") else 4
    assert ours.state.log_history[0]["loss"] == logged(total / number, 1e-5)


# -------------------------------------------------------------------------------------- errors


class Logits(torch.nn.Module):
    def forward(self, input_ids):
        return input_ids


def test_errors():
    config = transformers.BertConfig(**ALIKE["BertForMaskedLM"])
    classifier = transformers.BertForSequenceClassification(config)
    with pytest.raises(TypeError, match="has no output embeddings to fuse a loss with; take its"):
        fuse_loss(classifier, segloss.FocalLoss())
    with pytest.raises(TypeError, match="Logits has no output embeddings"):
        fuse_loss(Logits(), segloss.FocalLoss())
    with pytest.raises(ValueError, match="loss has reduction='none'"):
        fuse_loss(tiny_model(), segloss.FocalLoss(reduction="none"))
    with pytest.raises(TypeError, match="criterion is a float; it takes a segloss loss"):
        fuse_loss(tiny_model(), 1.0)
    bamba = tiny_model()
    bamba.z_loss_coefficient = 0.1
    fuse_loss(bamba, segloss.FocalLoss())
    with pytest.raises(ValueError, match=r"z_loss_coefficient is 0\.1\); set that to 0 and give"):
        bamba(**batch())


def test_trl_is_refused(tmp_path):
    """Its SFTTrainer never reads the model's loss: not even a wrapped model may train there."""
    trl = pytest.importorskip("trl")
    peft = pytest.importorskip("peft")
    from integrations import test_trl

    words = r"take segloss\.integrations\.trl\.SFTTrainer"
    model = tiny_model()
    fuse_loss(model, segloss.FocalLoss())
    with pytest.raises(TypeError, match=words):
        model(**batch(), fused_lm_head=True)
    adapters = peft.LoraConfig(r=2, target_modules=["q_proj"])
    for options in ({}, {"peft_config": adapters}):
        model = tiny_model()
        fuse_loss(model, segloss.FocalLoss())
        theirs = test_trl.trainer(tmp_path, model, trainer_class=trl.SFTTrainer, **options)
        with pytest.raises(TypeError, match=words):
            theirs.train()


@pytest.mark.parametrize("order", ["fused, compiled", "compiled, fused", "in place"])
def test_a_compiled_model_can_be_fused(order):
    torch._dynamo.reset()
    value, grads = truth(plain_cross_entropy)
    model = tiny_model()
    called = model
    if order == "in place":
        model.compile(backend="eager")
    elif order == "compiled, fused":
        called = torch.compile(model, backend="eager")
    fuse_loss(called, segloss.CrossEntropyLoss())
    if order == "fused, compiled":
        called = torch.compile(model, backend="eager")
    for _ in range(2):
        model.zero_grad()
        loss = called(**batch()).loss
        loss.backward()
        torch.testing.assert_close(loss, value)
        torch.testing.assert_close(gradients(model), grads)
    assert called(input_ids=batch()["input_ids"]).logits.shape == (4, 9, V)


PACKED = {
    "position_ids": {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5]]).expand(4, -1)},
    "positions from 1": {"position_ids": torch.tensor([[1, 2, 3, 1, 2, 3, 4, 5, 6]]).expand(4, -1)},
    "sample_ids": {"sample_ids": torch.tensor([[5, 5, 5, -1, -1, -1, -1, -1, -1]]).expand(4, -1)},
}


@pytest.mark.parametrize("put", [fuse_loss, set_loss_function])
@pytest.mark.parametrize("name", PACKED)
def test_the_first_label_of_a_packed_sample_is_predicted_by_nothing(put, name):
    model, columns = tiny_model(), PACKED[name]
    ids = batch()["input_ids"]
    positions = {k: v for k, v in columns.items() if k == "position_ids"}
    target = F.pad(ids, (0, 1), value=-100)[:, 1:]
    target[:, 2] = -100  # the fourth token begins another sample
    with torch.no_grad():
        expected = plain_cross_entropy(
            model(input_ids=ids, use_cache=False, **positions).logits, target
        )
    put(model, segloss.CrossEntropyLoss())
    with torch.no_grad():
        found = model(input_ids=ids, labels=ids, use_cache=False, **columns).loss
        torch.testing.assert_close(found, expected)
        if positions:  # in its place among the arguments
            found = model(ids, None, columns["position_ids"], labels=ids, use_cache=False).loss
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("put", [fuse_loss, set_loss_function])
def test_padding_on_the_left_packs_nothing(put):
    """Places that begin after it do not change the loss of rows that are padded on the left."""
    model, ids = tiny_model(), batch()["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, :5] = 0
    places = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
    labels = ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        target = F.pad(labels, (0, 1), value=-100)[:, 1:]
        expected = plain_cross_entropy(model(**inputs, use_cache=False).logits, target)
        put(model, segloss.CrossEntropyLoss())
        found = model(**inputs, labels=labels, use_cache=False).loss
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("put", [fuse_loss, set_loss_function])
def test_sample_weights_are_refused(put):
    model = tiny_model()
    put(model, segloss.CrossEntropyLoss())
    with pytest.raises(TypeError, match=r"has sample_weights, .*: take LossMixin, or token_weight"):
        model(**batch(), sample_weights=torch.ones(4))


@pytest.mark.parametrize("put", [fuse_loss, set_loss_function])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_token_weight_that_is_none(put, value):
    model = tiny_model()
    put(model, segloss.CrossEntropyLoss())
    weight = torch.ones(4, 9, dtype=torch.float64)
    weight[1, 8] = value
    with pytest.raises(ValueError, match=f"token_weight has a value of {value}; it takes numbers"):
        model(**batch(), token_weight=weight)
    rows, weight[1, 8] = batch(), 1
    expected = model(**rows, token_weight=weight).loss
    ignored = rows["labels"] == -100
    found = model(**rows, token_weight=weight.masked_fill(ignored, value)).loss
    torch.testing.assert_close(found, expected)


def test_a_hook_that_changes_the_logits_of_the_head():
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda module, arguments, output: output * 2)
    fuse_loss(model, segloss.CrossEntropyLoss())
    with pytest.raises(
        TypeError, match=r"a forward hook on the head of Llama.*model\(...\).logits"
    ):
        model(**batch())


@pytest.mark.parametrize("put", [fuse_loss, set_loss_function])
def test_a_trainer_that_smooths_labels_itself_is_refused(put, tmp_path):
    """It takes the labels out and would never read the loss."""
    model = tiny_model()
    put(model, segloss.FocalLoss())
    made = trainer(
        tmp_path, model=model, rows=without_tasks(), trainer_class=transformers.Trainer,
        label_smoothing_factor=0.1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="set label_smoothing_factor to 0 and give the loss its"):
        made.train()

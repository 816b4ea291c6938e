"""Inputs of the kinds that users report of fused losses, each against the model's own loss."""

import copy
import functools

import pytest
import torch
from integration_helpers import training_arguments

import segloss

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
from integrations.test_fuse import SIZES  # noqa: E402  (needs transformers)
from integrations.test_trainer import LossTrainer  # noqa: E402

from segloss.integrations.transformers import fuse_loss, head_loss, next_tokens  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:'pin_memory' argument is set as true:UserWarning",
    "ignore:`is_gradient_checkpointing`:FutureWarning",  # of peft
    "ignore::UserWarning:peft",
    "ignore:Version v4.12.0 introduces:FutureWarning",  # of two models joined
)
IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
CE = segloss.CrossEntropyLoss()
BERT = {
    "vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def llama(**options):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **options))


def adapted(tied=True, **options):
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(llama(tie_word_embeddings=tied), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def weight_normed():
    model = llama()
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)
    return model


def with_a_hook_before_its_head():
    model = llama()
    model.lm_head.register_forward_pre_hook(lambda module, given: (given[0] * 2,))
    return model


def with_a_forward_of_its_head_replaced():
    model = llama()
    model.lm_head.forward = functools.partial(torch.nn.Linear.forward, model.lm_head)
    return model


def with_its_forward_replaced():
    model = llama()
    forward = model.forward
    model.forward = lambda *arguments, **keywords: forward(*arguments, **keywords)
    return model


MODELS = {
    "trained tokens of a tied embedding": lambda: adapted(
        target_modules=["q_proj"], trainable_token_indices=[5, 6]
    ),
    "trained copies of a tied pair": lambda: adapted(
        target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    ),
    "LoRA on a tied embedding": lambda: adapted(target_modules=["embed_tokens", "q_proj"]),
    "a head with weight norm": weight_normed,
    "a hook before the head": with_a_hook_before_its_head,
    "the head's forward replaced": with_a_forward_of_its_head_replaced,
    "the model's forward replaced": with_its_forward_replaced,
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    model = MODELS[name]()
    grads = []
    for fused in (False, True):
        model.zero_grad()
        if fused:
            loss = head_loss(model, CE, next_tokens(IDS), input_ids=IDS)[0]
        else:
            loss = CE(model(input_ids=IDS).logits, next_tokens(IDS))
        loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    own, found = grads
    assert own.keys() == found.keys()
    for parameter, grad in own.items():
        assert (found[parameter] - grad).norm() <= 2e-6 * grad.norm() + 1e-9, parameter
    fuse_loss(model, CE)
    assert model(input_ids=IDS, labels=IDS).loss.item() == pytest.approx(loss.item(), rel=1e-6)


def test_adapters_that_are_merged_into_a_fused_model():
    model = adapted(False, target_modules=["lm_head", "q_proj"])
    own = CE(model(input_ids=IDS).logits, next_tokens(IDS)).item()
    fuse_loss(model, CE)
    assert model(input_ids=IDS, labels=IDS).loss.item() == pytest.approx(own, rel=1e-6)
    merged = model.merge_and_unload()
    assert merged(input_ids=IDS, labels=IDS).loss.item() == pytest.approx(own, rel=1e-5)


def test_a_copy_of_a_fused_model_is_a_model_of_its_own():
    """As of one that averages weights."""
    model = llama()
    fuse_loss(model, CE)
    before = model(input_ids=IDS, labels=IDS).loss
    average = copy.deepcopy(model)
    average.lm_head.weight.data.mul_(3)
    own = CE(average(input_ids=IDS).logits, next_tokens(IDS))
    torch.testing.assert_close(average(input_ids=IDS, labels=IDS).loss, own)
    torch.testing.assert_close(model(input_ids=IDS, labels=IDS).loss, before)


def test_embeddings_for_tokens():
    model, own = llama(), llama()(input_ids=IDS, labels=IDS).loss
    fuse_loss(model, CE)
    embedded = model.get_input_embeddings()(IDS).detach()
    torch.testing.assert_close(model(inputs_embeds=embedded, labels=IDS).loss, own)
    torch.testing.assert_close(model(IDS, None, labels=IDS.int()).loss, own)


def test_fewer_logits_than_labels():
    target, model = next_tokens(IDS), llama()
    loss, _ = head_loss(model, CE, target[:, -4:], input_ids=IDS, logits_to_keep=4)
    torch.testing.assert_close(loss, CE(model(input_ids=IDS).logits[:, -4:], target[:, -4:]))
    with pytest.raises(ValueError, match=r"gives logits for \(2, 4\) places; it takes a target of"):
        head_loss(model, CE, target, input_ids=IDS, logits_to_keep=4)


def multiple_choice():
    batch = {"input_ids": IDS.view(1, 2, 9).repeat(3, 1, 1), "labels": torch.tensor([0, 1, 0])}
    return transformers.BertForMultipleChoice(transformers.BertConfig(**BERT)), batch


def next_sentence():
    batch = {"input_ids": IDS, "labels": torch.tensor([0, 1])}
    return transformers.BertForNextSentencePrediction(transformers.BertConfig(**BERT)), batch


def two_models():
    encoder = transformers.BertModel(transformers.BertConfig(**BERT))
    config = transformers.BertConfig(**BERT, is_decoder=True, add_cross_attention=True)
    model = transformers.EncoderDecoderModel(
        encoder=encoder, decoder=transformers.BertLMHeadModel(config)
    )
    model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    return model, {"input_ids": IDS, "labels": IDS}


def later_positions():
    places = torch.arange(5, 14).expand(2, 9)
    return llama(), {"input_ids": IDS, "labels": IDS, "position_ids": places}


@pytest.mark.parametrize(
    "make", [multiple_choice, next_sentence, two_models, later_positions], ids=lambda f: f.__name__
)
def test_batches(make, tmp_path):
    torch.manual_seed(0)
    model, batch = make()
    trainer = LossTrainer(model, training_arguments(tmp_path))
    model.eval()
    found = trainer.compute_loss(model, dict(batch))
    torch.testing.assert_close(found, model(**batch).loss, rtol=1e-5, atol=1e-6)


def test_rows_that_a_collator_flattens(tmp_path):
    rows = [[5, 6, 7], [8, 9, 10, 11]]
    flatten = transformers.DataCollatorWithFlattening()
    model = llama()
    trainer = LossTrainer(model, training_arguments(tmp_path))
    model.eval()
    found = trainer.compute_loss(model, flatten([{"input_ids": row} for row in rows]))
    alone = [model(input_ids=torch.tensor([r]), labels=torch.tensor([r])).loss for r in rows]
    torch.testing.assert_close(found, (2 * alone[0] + 3 * alone[1]) / 5, rtol=1e-5, atol=1e-6)


ROWS = [{"input_ids": row, "labels": row} for row in torch.arange(3, 33).view(5, 6).tolist()]
SETTINGS = {
    "batches that are split": {"accelerator_config": {"split_batches": True}},
    "a last step of fewer rows": {
        "gradient_accumulation_steps": 4, "max_steps": -1, "num_train_epochs": 1,
    },
    "noise on the embeddings": {"neftune_noise_alpha": 5.0},
    "batches of the size that fits": {"auto_find_batch_size": True},
    "tokens that are counted": {"include_num_input_tokens_seen": "all"},
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_a_trainer(name, tmp_path):
    """Logged as by a plain `Trainer`, whose loss is the same one."""
    losses = []
    for kind, options in ((transformers.Trainer, {}), (LossTrainer, {"loss": CE})):
        settings = {"per_device_train_batch_size": 2, "max_steps": 2} | SETTINGS[name]
        arguments = training_arguments(tmp_path / kind.__name__, **settings)
        trainer = kind(llama(), arguments, train_dataset=ROWS, **options)
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[0]


def test_weights_of_a_data_set_that_is_read_as_it_comes(tmp_path):
    datasets = pytest.importorskip("datasets")
    weight = [0.0, 1.0, 2.0, 0.0, 0.5, 1.0]
    rows = [row | {"token_weight": weight} for row in ROWS]
    losses = []
    for data in (rows, datasets.Dataset.from_list(rows).to_iterable_dataset()):
        arguments = training_arguments(tmp_path, per_device_train_batch_size=2, max_steps=1)
        trainer = LossTrainer(llama(), arguments, train_dataset=data, loss=CE)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_rows_of_one_token(tmp_path):
    """Nothing is predicted: 0, with gradients of 0."""
    model = llama()
    trainer = LossTrainer(model, training_arguments(tmp_path))
    model.train()
    loss = trainer.compute_loss(model, {"input_ids": IDS[:, :1], "labels": IDS[:, :1]})
    loss.backward()
    assert loss.item() == 0
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_metrics_of_logits_that_are_cut_beforehand(tmp_path):
    arguments = training_arguments(tmp_path, per_device_eval_batch_size=2)
    trainer = LossTrainer(
        llama(), arguments, eval_dataset=ROWS, loss=CE,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        compute_metrics=lambda given: {"places": float(given.predictions.shape[1])},
    )  # fmt: skip
    plain = transformers.Trainer(llama(), arguments, eval_dataset=ROWS).evaluate()
    metrics = trainer.evaluate()
    assert metrics["eval_places"] == 6
    assert metrics["eval_nll"] == pytest.approx(plain["eval_loss"], rel=1e-5)

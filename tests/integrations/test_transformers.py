"""`head_logits` against the model's own logits, for several model families."""

import pytest
import torch

import segloss

transformers = pytest.importorskip("transformers")
from segloss.integrations.transformers import head_logits  # noqa: E402  (needs transformers)

V = 97
TOKENS = torch.randint(0, V, (2, 9), generator=torch.Generator().manual_seed(0))
TARGET = torch.randint(0, V, (2, 9), generator=torch.Generator().manual_seed(1))
SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "pad_token_id": 0,
}


def tiny(family: str, **options):
    config = getattr(transformers, f"{family}Config")(**SIZES, **options)
    name = "Gemma3" if family == "Gemma3Text" else family
    return getattr(transformers, f"{name}ForCausalLM")(config).float()


MODELS = {
    "Llama": lambda: tiny("Llama"),
    "tied Llama": lambda: tiny("Llama", tie_word_embeddings=True),
    "Gemma2, soft-cap": lambda: tiny("Gemma2", head_dim=8, final_logit_softcapping=3.0),
    "Gemma3": lambda: tiny("Gemma3Text", head_dim=8),
    "Cohere, logit_scale": lambda: tiny("Cohere", logit_scale=0.3),
    "Granite, logits_scaling": lambda: tiny("Granite", logits_scaling=4.0),
}


def assert_same_training(model, loss):
    loss(head_logits(model, input_ids=TOKENS), TARGET).backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss(model(input_ids=TOKENS).logits, TARGET).backward()
    theirs = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        assert (ours[name] - grad).norm() <= 1e-5 * grad.norm() + 1e-9, name


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("loss", [segloss.CrossEntropyLoss(), segloss.LovaszSoftmaxLoss()])
def test_model_families(name, loss):
    assert_same_training(MODELS[name](), loss)


def test_value_is_the_models_own():
    model = tiny("Llama")
    loss = segloss.CrossEntropyLoss()
    ours = loss(head_logits(model, input_ids=TOKENS), TARGET)
    assert torch.allclose(ours, loss(model(input_ids=TOKENS).logits, TARGET), rtol=1e-6)


def test_logits_are_never_made():
    model = tiny("Llama")
    made = []
    model.lm_head.register_forward_hook(lambda m, i, o: made.append(o[-1].shape[-2]))
    segloss.CrossEntropyLoss()(head_logits(model, input_ids=TOKENS), TARGET).backward()
    assert made[1:] == [1]


from_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@from_peft
@pytest.mark.parametrize("modules", [["lm_head"], ["q_proj", "lm_head"], ["q_proj"]])
def test_lora(modules):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=modules)
    model = peft.get_peft_model(tiny("Llama"), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, which would leave A without a gradient
            torch.nn.init.normal_(parameter, std=0.1)
    assert_same_training(model, segloss.FocalLoss())


def test_a_model_that_does_more_to_its_logits_is_refused():
    model = tiny("Llama")
    forward = model.forward

    def shifted(*args, logits_to_keep=0, **kwargs):
        outputs = forward(*args, logits_to_keep=logits_to_keep, **kwargs)
        outputs.logits = outputs.logits + 0.01 * outputs.logits.roll(1, -1)
        return outputs

    model.forward = shifted
    with pytest.raises(ValueError, match="does more to its head's logits"):
        head_logits(model, input_ids=TOKENS)


def test_what_is_no_causal_model_is_refused():
    with pytest.raises(TypeError, match="takes a transformers causal LM"):
        head_logits(torch.nn.Linear(3, 3), input_ids=TOKENS)

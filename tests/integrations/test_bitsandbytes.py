"""Heads that bitsandbytes has quantised: `make compat COMPAT=bitsandbytes`."""

import pytest
import torch
from integration_helpers import assert_losses_are_of_its_logits, quantisable

pytestmark = [pytest.mark.quantised, pytest.mark.filterwarnings("ignore")]


def quantised(kind):
    import bitsandbytes.nn as bnb

    model = quantisable()
    weight = model.lm_head.weight.data.clone()
    if kind == "int8":
        head = bnb.Linear8bitLt(128, 128, bias=False, has_fp16_weights=False)
        head.weight = bnb.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        head = bnb.Linear4bit(128, 128, bias=False, compute_dtype=weight.dtype, quant_type=kind)
        head.weight = bnb.Params4bit(weight, requires_grad=False, quant_type=kind)
    model.lm_head = head.to("cpu")
    assert not model.lm_head.weight.is_floating_point()
    return model


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_weights(kind):
    assert_losses_are_of_its_logits(quantised(kind))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_lora_on_such_a_head(kind):
    """As QLoRA has it."""
    import peft

    # of the head alone bitsandbytes takes other kernels, since its input has no gradient
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    model = peft.get_peft_model(quantised(kind), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, which would leave A without a gradient
            torch.nn.init.normal_(parameter, std=0.1)
    assert_losses_are_of_its_logits(model)

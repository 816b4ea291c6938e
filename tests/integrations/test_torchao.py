"""Heads that torchao has quantised: `make compat COMPAT=torchao`."""

import pytest
from integration_helpers import assert_losses_are_of_its_logits, quantisable

pytestmark = [pytest.mark.quantised, pytest.mark.filterwarnings("ignore")]
WEIGHTS = {
    "int8": ("Int8WeightOnlyConfig", {}),
    "int4": ("IntxWeightOnlyConfig", {"weight_dtype": "int4"}),
    "fp8": ("Float8WeightOnlyConfig", {}),
}


def quantised(name, **options):
    import torch
    import torchao.quantization as torchao

    options = {key: getattr(torch, value) for key, value in options.items()}
    model = quantisable()
    config = getattr(torchao, name)(**options)
    torchao.quantize_(model, config, filter_fn=lambda module, path: path == "lm_head")
    assert type(model.lm_head.weight) is not torch.nn.Parameter
    return model


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights(kind):
    name, options = WEIGHTS[kind]
    assert_losses_are_of_its_logits(quantised(name, **options))


def test_a_head_for_inference_alone():
    from segloss import CrossEntropyLoss
    from segloss.integrations.transformers import head_loss, next_tokens

    model = quantised("Int8DynamicActivationInt8WeightConfig")
    ids = model.dummy_inputs["input_ids"]
    loss, _ = head_loss(model, CrossEntropyLoss(), next_tokens(ids), input_ids=ids)
    with pytest.raises(TypeError, match="the forward of the head, a Linear, gives no gradient"):
        loss.backward()

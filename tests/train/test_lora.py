"""LoRA: which layers get adapters, what is trained, and the merged model that comes out."""

import json

import pytest
import torch
from safetensors.torch import load_file
from train.tiny import build_model

from segloss.train import lora
from segloss.train.config import TrainConfig
from segloss.train.errors import UserError


def attached(targets, tied=False, dropout=0.0):
    model = build_model()
    if tied:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    config = TrainConfig(lora_rank=2, lora_targets=targets, lora_dropout=dropout).resolved()
    return lora.attach(model, config)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("q_proj",), {"q_proj"}),
        (("head",), {"lm_head"}),
        (("all-linear",), {f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")}),
        (("v_proj", "head"), {"v_proj", "lm_head"}),
    ],
)
def test_targets(targets, expected):
    model = attached(targets)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".lora_")[0].split(".")[-1] for name in trained} == expected
    assert all(".lora_" in name for name in trained)


def test_unknown_target_names_those_there_are():
    with pytest.raises(UserError, match="has 'wq'; this model's are down_proj gate_proj"):
        attached(("wq",))


def test_no_dropout_before_the_head():
    model = attached(("all-linear", "head"), dropout=0.5)
    head = model.get_base_model().lm_head
    assert isinstance(head.lora_dropout["default"], torch.nn.Identity)
    assert model.get_base_model().model.layers[0].mlp.up_proj.lora_dropout["default"].p == 0.5


@pytest.mark.parametrize("tied", [False, True])
def test_merged_model_computes_the_same_and_can_be_saved(tied, tmp_path):
    from transformers import AutoModelForCausalLM

    model = attached(("all-linear", "head"), tied=tied).eval()
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter)
    ids = torch.arange(12).view(2, 6)
    before = model(ids).logits
    merged = lora.merge(model)
    torch.testing.assert_close(merged(ids).logits, before, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).logits, before, rtol=1e-4, atol=1e-4)


def test_a_run_with_adapters(train, command, tmp_path):
    options = ("--lora-rank", 4, "--lora-targets", "all-linear", "head", "--lr", 0.05)
    code, _, err = train(*options, "--save-every", 2, "--task-weights", "coba", "--steps", 6,
                         "--validation-items", 2)  # fmt: skip
    assert code == 0, err
    run = tmp_path / "run"
    adapter = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (4, 8.0)
    state = load_file(run / "resume" / "step-00000006" / "state.safetensors")
    names = [name for name in state if name.startswith("model.")]
    assert names and all(".lora_" in name for name in names)
    code, _, err = command("evaluate", run, "--json", tmp_path / "result.json")
    assert code == 0, err
    result = json.loads((tmp_path / "result.json").read_text())["tasks"]
    trained = json.loads((run / "results.json").read_text())["tasks"]
    for ours, theirs in zip(result, trained, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss_after"], rel=1e-6)
        assert theirs["loss_after"] < theirs["loss_before"]

"""`head_loss` on one process: what a model does to its logits, heads of every kind, messages."""

import copy
import inspect
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import segloss

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
from segloss.integrations.transformers import head_logits, head_loss  # noqa: E402
from segloss.models.head import STATES  # noqa: E402
from segloss.models.transform import learnt, probes  # noqa: E402
from segloss.sources.module import ModuleLogits  # noqa: E402

V, D = 61, 16
TOKENS = torch.randint(3, V, (2, 9), generator=torch.Generator().manual_seed(0))
TARGET = torch.randint(3, V, (2, 9), generator=torch.Generator().manual_seed(1))
TARGET[0, :3] = -100
CE = segloss.CrossEntropyLoss()
LOSSES = {
    "ce": CE,
    "smoothed": segloss.CrossEntropyLoss(label_smoothing=0.1),
    "dice": segloss.DiceLoss(),
    "dice of all classes, per sample": segloss.DiceLoss(classes="all", per_sample=True),
    "lovasz": segloss.LovaszSoftmaxLoss(),
    "lovasz of all classes": segloss.LovaszSoftmaxLoss(classes="all"),
    "sum": 0.6 * CE + 0.4 * segloss.LovaszSoftmaxLoss(),
    "per token": segloss.FocalLoss(reduction="none"),
}


def llama(model_class=None, **options):
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
    config = transformers.LlamaConfig(**sizes, **heads, **options)
    return (model_class or transformers.LlamaForCausalLM)(config).double()


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(model, loss=CE, tolerance=1e-12, target=TARGET, random=False):
    """Value and every gradient are those of the loss of the model's own logits."""
    model.zero_grad()
    torch.manual_seed(3)
    ours, outputs = head_loss(model, loss, target, input_ids=TOKENS)
    ours.sum().backward()
    found = gradients(model)
    model.zero_grad()
    torch.manual_seed(3)
    logits = model(input_ids=TOKENS).logits
    theirs = loss(logits[:, -target.shape[1] :], target)
    theirs.sum().backward()
    assert torch.allclose(ours.double(), theirs.double(), rtol=tolerance, atol=0)
    if not random:  # the last place draws for itself
        assert (outputs.logits - logits[:, -1:]).abs().max() <= 1e-6 * logits.abs().max()
    true = gradients(model)
    assert found.keys() == true.keys()
    for name, grad in true.items():
        assert (found[name] - grad).norm() <= tolerance * grad.norm() + 1e-16, name


# --------------------------------------------------------------------- what models do to logits


def transformed(function):
    class Transformed(transformers.LlamaForCausalLM):
        def forward(self, *arguments, **keywords):
            outputs = super().forward(*arguments, **keywords)
            outputs.logits = function(outputs.logits)
            return outputs

    return llama(Transformed)


def masked(z):
    z = z.clone()
    z[..., [1, 7]] = torch.finfo(z.dtype).min
    return z


def padding_masked(z):
    z = z.clone()
    z[..., V - 1 :] = -1e9
    return z


LEARNT = {
    "scaled": lambda z: z * 0.37,
    "divided": lambda z: z / 7,
    "capped": lambda z: 3.0 * torch.tanh(z / 3.0),
    "scaled, then capped": lambda z: 30.0 * torch.tanh(0.37 * z / 30.0),
    "capped, then scaled": lambda z: 5.0 * torch.tanh(z / 3.0),
    "biased": lambda z: z + torch.linspace(-1, 1, V, dtype=z.dtype),
    "scaled and biased": lambda z: 0.4 * z + torch.linspace(-1, 1, V, dtype=z.dtype),
    "shifted": lambda z: z + 1.0,
    "padded classes cut off": lambda z: z[..., : V - 1],
    "padded classes masked": padding_masked,
    "classes masked": masked,
    "in float32": lambda z: (z * 0.37).float(),
}


@pytest.mark.parametrize("name", LEARNT)
@pytest.mark.parametrize("size", [1, 100])  # a cap shows at large logits only
def test_what_a_model_does_to_its_logits_is_learnt(name, size):
    model = transformed(LEARNT[name])
    model.lm_head.weight.data.mul_(size)
    target = TARGET.clamp(max=V - 2)
    target = torch.where((target == 7) & torch.tensor(name == "classes masked"), 8, target)
    assert_same(model, tolerance=1e-5 if name == "in float32" else 1e-11, target=target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_is_exact_in_any_dtype(dtype):
    model = transformed(lambda z: (z * 0.37).to(dtype)).to(dtype)
    head_loss(model, CE, TARGET, input_ids=TOKENS)
    assert STATES[model].transform.scale == pytest.approx(0.37, rel=1e-3)


@pytest.mark.parametrize("num_classes", [1, 2, 5, 61, 28657])  # a Fibonacci number spreads badly
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cap", [None, 30.0])
def test_learnt_of_any_width_and_dtype(num_classes, dtype, cap):
    z = probes(num_classes, torch.zeros(1))
    assert (z[0] == 0).all() and (z[1:] > 0).any(0).all() and (z[1:] < 0).any(0).all()
    out = 0.37 * z if cap is None else cap * torch.tanh(0.37 * z / cap)
    found = learnt("it", z, out.to(dtype)[None], dtype)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-7}.get(dtype, 2e-3)
    assert found.scale == pytest.approx(0.37, rel=tolerance)
    assert found.softcap == (None if cap is None else pytest.approx(cap, rel=tolerance))


NOT_LEARNT = {
    "neighbours": lambda z: z + 0.01 * z.roll(1, -1),
    "clamped": lambda z: z.clamp(-1, 1),
    "cubed": lambda z: z + 1e-3 * z**3,
    "negative": lambda z: -z,
    "normalised": lambda z: z / z.norm(dim=-1, keepdim=True),
}


@pytest.mark.parametrize("name", NOT_LEARNT)
def test_what_is_more_than_that_is_refused(name):
    with pytest.raises(ValueError, match=r"does more .* give the loss model\(...\).logits"):
        head_loss(transformed(NOT_LEARNT[name]), CE, TARGET, input_ids=TOKENS)


def test_trained_parameters_behind_the_head_are_refused():
    scale = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    model = transformed(lambda z: z * scale)
    with pytest.raises(TypeError, match="trains parameters behind its head"):
        head_loss(model, CE, TARGET, input_ids=TOKENS)


def test_a_change_is_found_later():
    """On calls 1, 2, 4, ...; the call after learns anew."""
    cap = [1.0]
    model = transformed(lambda z: cap[0] * z)
    for _ in range(3):
        head_loss(model, CE, TARGET, input_ids=TOKENS)
    cap[0] = 0.9
    with pytest.raises(ValueError, match=r"differ .* by 11\.1% of the largest"):
        head_loss(model, CE, TARGET, input_ids=TOKENS)
    assert_same(model)


def test_another_scale_in_training_is_found_on_the_first_call_in_it():
    """Here the third, on which nothing would be due."""

    class Other(transformers.LlamaForCausalLM):
        def forward(self, *arguments, **keywords):
            outputs = super().forward(*arguments, **keywords)
            outputs.logits = outputs.logits * (2.0 if self.training else 1.0)
            return outputs

    model = llama(Other).eval()
    for _ in range(2):
        head_loss(model, CE, TARGET, input_ids=TOKENS)
    with pytest.raises(ValueError, match=r"differ .* by 50\.0% of the largest"):
        head_loss(model.train(), CE, TARGET, input_ids=TOKENS)
    assert_same(model)


def test_another_head_is_learnt():
    model = llama()
    assert_same(model)
    model.resize_token_embeddings(V + 3)
    assert_same(model.double())
    assert STATES[model].transform.num_classes == V + 3


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_is_resized_in_its_place(tied):
    """On a call that compares nothing: the head of a tied model stays the same module."""
    model = llama(tie_word_embeddings=tied)
    for _ in range(4):
        head_loss(model, CE, TARGET, input_ids=TOKENS)
    if tied:
        model.resize_token_embeddings(V + 3)
    else:
        weight = model.lm_head.weight.data
        model.lm_head.weight = nn.Parameter(torch.cat([weight, weight[:3]]))
    target = TARGET.clone()
    target[1, 2] = V + 2
    assert_same(model.double(), target=target)


def test_learning_leaves_no_trace():
    """Neither in the random numbers of dropout nor in a cache that is given."""
    model = llama(attention_dropout=0.5).train()
    model.lm_head.weight.data.mul_(30)
    torch.manual_seed(0)
    first, _ = head_loss(model, CE, TARGET, input_ids=TOKENS)
    torch.manual_seed(0)
    assert first == head_loss(model, CE, TARGET, input_ids=TOKENS)[0]
    cache = transformers.DynamicCache(config=model.config)
    takes = inspect.signature(model.forward).parameters
    given = {"cache" if "cache" in takes else "past_key_values": cache}
    head_loss(copy.deepcopy(model).eval(), CE, TARGET, input_ids=TOKENS, **given)
    assert cache.get_seq_length() == TOKENS.shape[1]


# ------------------------------------------------------------------------------- heads of any kind

from_peft = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
ADAPTERS = {
    "LoRA": lambda: peft.LoraConfig(r=4, target_modules=["lm_head", "q_proj"]),
    "rsLoRA": lambda: peft.LoraConfig(r=4, target_modules=["lm_head"], use_rslora=True),
    "DoRA": lambda: peft.LoraConfig(r=4, target_modules=["lm_head"], use_dora=True),
    "LoRA with bias": lambda: peft.LoraConfig(r=4, target_modules=["lm_head"], lora_bias=True),
    "LoRA with dropout": lambda: peft.LoraConfig(r=4, target_modules=["lm_head"], lora_dropout=0.5),
    "IA3": lambda: peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]),
    "LoHa": lambda: peft.LoHaConfig(r=4, target_modules=["lm_head"]),
    "LoKr": lambda: peft.LoKrConfig(r=4, target_modules=["lm_head"]),
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=["lm_head"]),
    "VeRA": lambda: peft.VeraConfig(r=4, target_modules=["lm_head"]),
    "HRA": lambda: peft.HRAConfig(r=4, target_modules=["lm_head"]),
    "trained copy": lambda: peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]
    ),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}
LINEAR = {"LoRA", "rsLoRA", "trained copy", "prompt", "prefix"}


def adapted(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(llama(), ADAPTERS[name]()).double()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.train()


@from_peft
@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("loss", ["ce", "lovasz"])
def test_adapters(name, loss):
    model = adapted(name)
    # dropout draws for every place, so that none may be left out
    random = "dropout" in name
    assert_same(model, LOSSES[loss], target=TARGET.clamp(min=3 if random else -100), random=random)
    source = head_logits(model, input_ids=TOKENS)
    assert isinstance(source, segloss.LinearLogits if name in LINEAR else ModuleLogits)


@from_peft
def test_several_adapters_and_none():
    model = adapted("LoRA")
    model.add_adapter("second", ADAPTERS["LoRA"]())
    model.base_model.set_adapter(["default", "second"])
    assert_same(model.double())
    with model.disable_adapter():
        head = model.get_base_model().lm_head.base_layer.weight
        source = head_logits(model, input_ids=TOKENS)
        assert source.lora is None and source.weight is head


@from_peft
def test_an_adapter_that_mixes_places_is_refused():
    config = peft.LilyConfig(r=4, target_modules=["lm_head"])
    model = peft.get_peft_model(llama(), config).double()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    with pytest.raises(TypeError, match="depends on the other places"):
        head_loss(model, CE, TARGET, input_ids=TOKENS)


class NormedHead(nn.Module):
    """A head of a user's own."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.dense = nn.Linear(D, D)
        self.out = nn.Linear(D, V)

    def forward(self, hidden):
        return self.out(F.gelu(self.dense(self.norm(hidden))))


class Int8Head(nn.Module):
    """As a quantised layer: its weight is no float tensor, and only its forward says what it is."""

    def __init__(self, weight):
        super().__init__()
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (weight / self.scale).round().to(torch.int8))

    def forward(self, hidden):
        return hidden @ (self.weight * self.scale).to(hidden.dtype).T


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("rows", [1, 4, 512])
def test_a_head_of_ones_own(loss, rows, monkeypatch):
    monkeypatch.setattr("segloss.sources.module.CPU_CHUNK_ROWS", rows)
    monkeypatch.setattr("segloss.sources.module.CPU_CHUNK_BYTES", 1)
    model = llama()
    model.lm_head = NormedHead().double()
    assert_same(model, LOSSES[loss])


@pytest.mark.parametrize("loss", ["ce", "lovasz"])
def test_a_head_whose_weight_is_no_float_tensor(loss):
    model = llama()
    model.lm_head = Int8Head(model.lm_head.weight.detach())
    assert_same(model, LOSSES[loss])


MADE = {
    "weight norm": nn.utils.parametrizations.weight_norm,
    "pruned": lambda head: prune.l1_unstructured(head, "weight", 0.3),
    "hidden states scaled": lambda head: head.register_forward_pre_hook(lambda _, x: (0.3 * x[0],)),
    "gradient of the weight changed": lambda head: head.weight.register_hook(lambda grad: 3 * grad),
}


@pytest.mark.parametrize("name", MADE)
def test_a_weight_that_is_made_of_others(name):
    model = llama()
    MADE[name](model.lm_head)
    assert_same(model, LOSSES["sum"])
    assert isinstance(head_logits(model, input_ids=TOKENS), segloss.LinearLogits)


@pytest.mark.parametrize(
    "register", ["register_full_backward_hook", "register_full_backward_pre_hook"]
)
def test_a_backward_hook_on_the_head_is_refused(register):
    """As Opacus has them: it would see no gradient and change nothing."""
    model = llama()
    handle = getattr(model.lm_head, register)(lambda *arguments: None)
    with pytest.raises(TypeError, match="a backward hook on the head of LlamaForCausalLM waits"):
        head_loss(model, CE, TARGET, input_ids=TOKENS)
    handle.remove()
    assert_same(model)


def test_a_head_for_inference_alone():
    class Rounding(nn.Linear):
        def forward(self, hidden):
            with torch.no_grad():
                return super().forward(hidden)

    model = llama()
    model.lm_head = Rounding(D, V).double()
    loss, _ = head_loss(model, CE, TARGET, input_ids=TOKENS)
    with pytest.raises(TypeError, match="of the head, a Rounding, gives no gradient to its input"):
        loss.backward()


def test_such_a_head_scaled_capped_masked_and_padded():
    def more(z):
        z = 3.0 * torch.tanh(z[..., : V - 1] * 0.4 / 3.0)
        z[..., 2] = -1e9
        return z

    model = transformed(more)
    model.lm_head = NormedHead().double()
    assert_same(model, LOSSES["sum"], target=TARGET.clamp(max=V - 2))


def test_random_numbers_of_such_a_head_are_those_of_its_gradient():
    """The gradient is of the value that was returned, dropout's mask included."""
    model = llama().train()
    model.lm_head = nn.Sequential(nn.Dropout(0.5), nn.Linear(D, V)).double()
    weight = model.lm_head[1].weight

    def value(shift):
        with torch.no_grad():
            weight[5, 3] += shift
        torch.manual_seed(0)
        return head_loss(model, LOSSES["dice"], TARGET, input_ids=TOKENS)[0]

    value(0.0).backward()
    slope = (value(1e-5).item() - value(-2e-5).item()) / 2e-5
    assert weight.grad[5, 3].item() == pytest.approx(slope, rel=1e-6)


# --------------------------------------------------------------------------- criteria and outputs


def test_a_criterion_may_return_statistics():
    model = llama()

    def criterion(source, target):
        loss, statistics = CE(source, target, return_statistics=True)
        own = segloss.logit_statistics(source, target)
        return {"loss": loss, "more": [statistics, own]}

    found, outputs = head_loss(model, criterion, TARGET, input_ids=TOKENS)
    logits = model(input_ids=TOKENS).logits
    log_prob = torch.log_softmax(logits, -1)
    nll = -log_prob.gather(-1, TARGET.clamp(min=0)[..., None])[..., 0]
    valid = TARGET != -100
    assert torch.allclose(found["loss"], nll[valid].mean(), rtol=1e-12)
    assert torch.equal(found["more"][0].argmax[valid], logits.argmax(-1)[valid])
    found["more"][1].log_prob.sum().backward()
    ours = gradients(model)
    model.zero_grad()
    (-nll[valid]).sum().backward()
    for name, grad in gradients(model).items():
        assert (ours[name] - grad).norm() <= 1e-12 * grad.norm(), name
    assert outputs.loss is None


def test_outputs():
    model = llama()
    loss, outputs = head_loss(model, CE, TARGET, input_ids=TOKENS, output_hidden_states=True)
    assert outputs.loss is loss and outputs[0] is loss and len(outputs.hidden_states) == 2
    assert outputs.logits.shape == (2, 1, V) and not outputs.logits.requires_grad
    with torch.no_grad():
        loss, _ = head_loss(model, CE, TARGET, input_ids=TOKENS)
    assert not loss.requires_grad
    assert "forward" not in vars(model) and "forward" not in vars(model.lm_head)


def test_everything_is_put_back_after_an_error():
    model = llama()

    def criterion(source, target):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        head_loss(model, criterion, TARGET, input_ids=TOKENS)
    assert "forward" not in vars(model) and "forward" not in vars(model.lm_head)
    assert not model.lm_head._forward_hooks
    assert_same(model)


def test_a_checkpointed_model():
    model = llama().train()
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name from 5.2x on
    (enable or model.gradient_checkpointing_enable)()
    assert_same(model)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # which dynamo looks at
def test_a_compiled_model():
    """The head is where its graph breaks; a second call compiles nothing."""
    model = torch.compile(llama(), backend="eager")
    assert_same(model)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert_same(model)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs > 0


def test_weights_in_float32_under_autocast():
    model = llama().float()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = head_loss(model, CE, TARGET, input_ids=TOKENS)
        logits = model(input_ids=TOKENS).logits
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(CE(logits.float(), TARGET).item(), rel=1e-3)


# -------------------------------------------------------------------------------------- messages


def test_labels_are_refused():
    with pytest.raises(ValueError, match="labels is among the model's inputs"):
        head_loss(llama(), CE, TARGET, input_ids=TOKENS, labels=TOKENS)


def test_a_target_of_another_shape():
    with pytest.raises(ValueError, match=r"the head of LlamaForCausalLM gives logits for \(2, 9\)"):
        head_loss(llama(), CE, TARGET[:, 1:], input_ids=TOKENS)


def test_logits_that_are_not_finite():
    model = llama().half()
    model.lm_head.weight.data.mul_(1e6)
    with pytest.raises(ValueError, match=r"are not finite: .* too large for torch\.float16"):
        head_loss(model, CE, TARGET, input_ids=TOKENS)


def test_a_model_without_a_head():
    model = transformers.LlamaModel(llama().config)
    with pytest.raises(TypeError, match="has no output embeddings"):
        head_loss(model, CE, TARGET, input_ids=TOKENS)


def test_a_head_that_is_not_called_or_called_twice():
    class Unused(transformers.LlamaForCausalLM):
        def forward(self, input_ids):
            hidden = self.model(input_ids=input_ids).last_hidden_state
            logits = F.linear(hidden, self.lm_head.weight)
            return transformers.modeling_outputs.CausalLMOutput(logits=logits)

    class Twice(transformers.LlamaForCausalLM):
        def forward(self, *arguments, **keywords):
            super().forward(*arguments, **keywords)
            return super().forward(*arguments, **keywords)

    for kind, times in ((Unused, 0), (Twice, 2)):
        with pytest.raises(TypeError, match=f"called its head {times} times"):
            head_loss(llama(kind), CE, TARGET, input_ids=TOKENS)


def test_a_quantised_weight_names_the_call_that_serves():
    """As bitsandbytes and fp8 layers hold it."""
    for dtype in (torch.uint8, torch.int8, torch.float8_e4m3fn):
        weight = torch.zeros(V, D).to(dtype)
        with pytest.raises(TypeError, match="a quantised head is used by its own forward"):
            segloss.LinearLogits(torch.randn(3, D), weight)


def test_torch_func_is_refused():
    def loss(z):
        return CE(z, torch.tensor([1, 2]))

    with pytest.raises(TypeError, match=r"torch\.func transform .* use loss\.backward"):
        torch.func.grad(loss)(torch.randn(2, 5))


@pytest.mark.parametrize("size", [1, 100])
def test_a_cap_that_has_another_name(size):
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "hidden_size": D, "intermediate_size": 32, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "lru_width": 16, "pad_token_id": 0}
    config = transformers.RecurrentGemmaConfig(**sizes, **heads)
    model = transformers.RecurrentGemmaForCausalLM(config).eval()
    model.lm_head.weight.data.mul_(size)
    loss, _ = head_loss(model, CE, TARGET, input_ids=TOKENS)
    expected = CE(model(input_ids=TOKENS).logits, TARGET)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert STATES[model].transform.softcap == pytest.approx(config.logits_soft_cap, rel=1e-6)


def test_data_parallel_is_refused():
    with pytest.raises(TypeError, match="DataParallel"):
        head_loss(nn.DataParallel(llama()), CE, TARGET, input_ids=TOKENS)


def test_a_criterion_and_a_target_that_are_none():
    with pytest.raises(TypeError, match="criterion is 'ce'; it takes a segloss loss or a callable"):
        head_loss(llama(), "ce", TARGET, input_ids=TOKENS)
    with pytest.raises(TypeError, match=r"target is a list .*; it takes a tensor \(B, T\)"):
        head_loss(llama(), CE, TARGET.tolist(), input_ids=TOKENS)


def test_a_cache_with_a_gradient():
    """What was read before is trained through, as with the model's own logits."""
    found, losses = [], []
    for fused in (True, False):
        model = llama().eval()
        past = transformers.DynamicCache(config=model.config)
        takes = inspect.signature(model.forward).parameters
        given = {"cache" if "cache" in takes else "past_key_values": past}
        model(input_ids=TOKENS[:, :4], use_cache=True, **given)
        rest = {"input_ids": TOKENS[:, 4:], **given}
        if fused:
            loss, _ = head_loss(model, CE, TARGET[:, 4:], **rest)
        else:
            loss = F.cross_entropy(model(**rest).logits.flatten(0, 1), TARGET[:, 4:].flatten())
        loss.backward()
        losses.append(loss)
        found.append(model.model.layers[0].self_attn.k_proj.weight.grad)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*found)

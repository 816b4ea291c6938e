"""What every engine is held to: three steps of training on several processes are those of one.

A case is a model, a loss and its data; the truth is plain PyTorch on the model's own logits.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import segloss
from segloss import reference

V, ROWS, TOKENS, STEPS, LR = 61, 4, 9, 3, 0.05
LOSSES = {
    "ce": (segloss.CrossEntropyLoss, reference.cross_entropy),
    "dice": (segloss.DiceLoss, reference.dice_loss),
    "lovasz": (segloss.LovaszSoftmaxLoss, reference.lovasz_softmax),
}
SUM = {"ce": 0.5, "dice": 0.3, "lovasz": 0.2}


def loss_of(name: str, group=None):
    if name == "sum":
        return sum(share * LOSSES[part][0](group=group) for part, share in SUM.items())
    return LOSSES[name][0](group=group)


def true_loss(name: str, logits, target):
    if name == "sum":
        return sum(share * LOSSES[part][1](logits, target) for part, share in SUM.items())
    return LOSSES[name][1](logits, target)


def gpt2(**options):
    """In float64 throughout: a Llama's norms round to float32, and a last bit then shows."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": V, "n_positions": TOKENS, "n_embd": 16, "n_layer": 2, "n_head": 2}
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    special = {"bos_token_id": 1, "eos_token_id": 2}
    options = {"tie_word_embeddings": False, "attn_implementation": "eager"} | options
    return GPT2LMHeadModel(GPT2Config(**(sizes | drops | special | options)))


def soft_capped():
    from transformers import GPT2LMHeadModel

    class CappedGPT2(GPT2LMHeadModel):
        def forward(self, *arguments, **keywords):
            outputs = super().forward(*arguments, **keywords)
            outputs.logits = 2.0 * torch.tanh(0.7 * outputs.logits / 2.0)
            return outputs

    return CappedGPT2(gpt2().config)


def frozen():
    model = gpt2()
    model.lm_head.requires_grad_(False)
    return model


def head_alone():
    model = gpt2().requires_grad_(False)
    model.lm_head.requires_grad_(True)
    return model


def checkpointed():
    model = gpt2()
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name in new releases
    (enable or model.gradient_checkpointing_enable)()
    return model


def own_head():
    model = gpt2()
    model.lm_head = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, V))
    return model


def lora(*modules: str, **options):
    """`use_dora` makes of it a head that is used by its own forward."""
    import peft

    options["fan_in_fan_out"] = True
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(modules), **options)
    with warnings.catch_warnings():  # of what peft makes of GPT-2's transposed weights
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(gpt2(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, which would leave A without a gradient
            torch.nn.init.normal_(parameter, std=0.1)
    return model


MODELS: dict[str, Callable] = {
    "trainable": gpt2,
    "frozen": frozen,
    "head alone": head_alone,
    "lora": lambda: lora("c_fc", "lm_head"),
    "lora on the head": lambda: lora("lm_head"),
    "tied": lambda: gpt2(tie_word_embeddings=True),
    "soft-capped": soft_capped,
    "checkpointed": checkpointed,
}
# as many classes on each of two ranks
EVEN_CLASSES = {"tied, even": lambda: gpt2(tie_word_embeddings=True, vocab_size=V + 1)}
OWN_FORWARD = {
    "dora": lambda: lora("lm_head", use_dora=True),
    "own head": own_head,
}


@dataclass(frozen=True)
class Case:
    model: str
    loss: str
    empty: bool = False  # the last rank has no valid token
    dtype: torch.dtype = torch.float64

    def __str__(self) -> str:
        return f"{self.model}, {self.loss}" + ", a rank without tokens" * self.empty

    def make(self):
        torch.manual_seed(0)
        model = (MODELS | EVEN_CLASSES | OWN_FORWARD)[self.model]().to(self.dtype).train()
        head = model.get_output_embeddings()
        weight = getattr(getattr(head, "base_layer", head), "weight", None)
        if weight is not None:  # a head that is sure of something
            weight.data.mul_(20)
        return model

    def data(self, step: int, rank: int = 0, ranks: int = 1):
        """(input_ids, target) of a rank's rows."""
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(1, V, (ROWS, TOKENS), generator=generator)
        prompt = torch.tensor([[3], [7], [1], [6]])  # every rank has another number of tokens
        target = F.pad(ids.masked_fill(torch.arange(TOKENS) < prompt, -100), (0, 1), value=-100)
        target = target[:, 1:]
        if self.empty:
            target[ROWS // 2 :] = -100
        return ids.chunk(ranks)[rank], target.chunk(ranks)[rank]

    @functools.cache  # noqa: B019  (cases are few and live as long as the tests)
    def truth(self) -> list:
        """[(loss, {parameter: gradient})] of three steps of SGD on one process."""
        model, steps = self.make(), []
        for step in range(STEPS):
            ids, target = self.data(step)
            logits = model(input_ids=ids).logits
            valid = target != -100
            loss = true_loss(self.loss, logits[valid], target[valid])
            model.zero_grad()
            loss.backward()
            steps.append((loss.item(), gradients(model)))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= LR * parameter.grad
        return steps


CASES = [Case(model, loss) for model in MODELS for loss in (*LOSSES, "sum")]
EVEN = [Case(model, loss) for model in EVEN_CLASSES for loss in (*LOSSES, "sum")]
OWN = [Case(model, loss) for model in OWN_FORWARD for loss in ("ce", "sum")]
EMPTY = [
    *(Case("trainable", loss, True) for loss in (*LOSSES, "sum")),
    *(Case(model, "sum", True) for model in ("lora", "frozen")),
]


def decoder(model):
    """The transformers model within peft's."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def gradients(model) -> dict[str, torch.Tensor]:
    """Of each parameter, whole."""
    return {
        name: getattr(p.grad, "full_tensor", p.grad.clone)()
        for name, p in model.named_parameters()
        if p.requires_grad and p.grad is not None
    }


def train(case: Case, wrap: Callable, read: Callable = gradients, averages: bool = True) -> list:
    """As `Case.truth`, by `head_loss` on this rank's rows of a model in an engine."""
    from segloss.integrations.transformers import head_loss

    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = wrap(case.make())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=LR)
    criterion, steps = loss_of(case.loss, dist.group.WORLD), []
    for step in range(STEPS):
        ids, target = case.data(step, rank, ranks)
        loss, outputs = head_loss(model, criterion, target, input_ids=ids)
        assert outputs.logits.shape[:2] == (len(ids), 1) and outputs.loss is loss
        optimizer.zero_grad()
        (loss * ranks if averages else loss).backward()
        steps.append((loss.item(), read(model)))
        optimizer.step()
    return steps


def results(pairs: Iterable[tuple[str, Case]], wraps: dict[str, Callable], **options) -> dict:
    return {(engine, str(case)): train(case, wraps[engine], **options) for engine, case in pairs}


def refusal(wrap: Callable) -> str:
    """What `head_logits` says under an engine that shards the head."""
    from segloss.integrations.transformers import head_logits

    try:
        head_logits(wrap(CASES[0].make()), input_ids=CASES[0].data(0)[0])
    except TypeError as error:
        return str(error)
    return "nothing"


def refusal_of_weight(model) -> str:
    """What `LinearLogits` says of the head's weight while the model does not run."""
    try:
        segloss.LinearLogits(torch.randn(3, 16, dtype=torch.float64), model.lm_head.weight)
    except TypeError as error:
        return str(error)
    return "nothing"


def assert_same(found: list, case: Case, tolerance: float = 1e-12) -> None:
    for (value, grads), (true_value, true_grads) in zip(found, case.truth(), strict=True):
        assert abs(value - true_value) <= max(tolerance, 1e-13) * abs(true_value)
        assert_close(grads, true_grads, tolerance)


def assert_close(grads: dict, true_grads: dict, tolerance: float) -> None:
    for name, error in errors_of(grads, true_grads).items():
        assert error <= tolerance, f"{name}: {error:.1e}"


def errors_of(grads: dict, true_grads: dict) -> dict[str, float]:
    """The norm of each parameter's error, relative to that of its gradient."""
    grads = {plain_name(name): grad.double() for name, grad in grads.items()}
    assert grads.keys() == true_grads.keys()
    return {
        name: float((grads[name] - true).norm() / true.norm().clamp(min=1e-30))
        for name, true in true_grads.items()
    }


def plain_name(name: str) -> str:
    for part in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        name = name.replace(part, "")
    return name.removeprefix("module.")

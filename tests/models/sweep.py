"""What segloss does with a model class: fused, from its logits, refused, or the class is not built.

python tests/models/sweep.py [class ...]       # the verdicts, as docs/models.md has them
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import transformers
from tiny import tiny_model
from transformers.models.auto import modeling_auto

import segloss
from segloss.integrations.transformers import head_loss, next_tokens

TOLERANCE = 2e-5  # of float32 sums of a few dozen terms


@dataclass(frozen=True)
class Verdict:
    name: str
    kind: str
    verdict: str  # "fused", "logits", "refused", "not built", or "WRONG", which no class may have
    reason: str = ""

    def row(self) -> str:
        return f"| {self.name} | {self.kind} | {self.verdict} | {self.reason.replace('|', '/')} |"


def names_of(*mappings: str) -> set[str]:
    found = set()
    for mapping in mappings:
        for value in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values():
            found |= {value} if isinstance(value, str) else set(value)
    return found


def public(ending: str) -> set[str]:
    return {n for n in dir(transformers) if n.endswith(ending) and not n.startswith("Auto")}


def classes() -> dict[str, list[str]]:
    """{kind of label: model classes} of the installed transformers."""
    aligned = names_of("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ")
    causal = public("ForCausalLM") | names_of("CAUSAL_LM")
    more = public("ForConditionalGeneration") - aligned - causal
    tokens, sequences = names_of("TOKEN_CLASSIFICATION"), names_of("SEQUENCE_CLASSIFICATION")
    return {
        "causal": sorted(causal),
        "conditional": sorted(more),
        "encoder-decoder": sorted(aligned),
        "token": sorted(tokens),
        "sequence": sorted(sequences - tokens),
    }


GENERATIVE = ("causal", "conditional", "encoder-decoder")
IDS = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))
IDS[:, -1] = 2  # the end, which some classifiers look for
LABELS = IDS.clone()
LABELS[0, :3] = -100
CRITERION = segloss.CrossEntropyLoss()


def verdict_of(name: str, kind: str) -> Verdict:
    try:
        model = tiny_model(name, **({} if kind in GENERATIVE else {"num_labels": 5}))
        inputs = inputs_of(model, kind)
        labels = torch.tensor([1, 3]) if kind == "sequence" else LABELS.remainder(5)
        labels = LABELS if kind in GENERATIVE else labels
        with torch.no_grad():
            logits = model(**inputs).logits
    except Exception as error:
        return Verdict(name, kind, "not built", one_line(error))
    if logits.shape[:-1] != labels.shape or int(labels.max()) >= logits.shape[-1]:
        return Verdict(name, kind, "refused", f"its logits have shape {tuple(logits.shape)}")
    sharpen(model)
    with torch.no_grad():
        logits = model(**inputs).logits
    target, reason = target_of(model, inputs, logits, labels, kind)
    if kind in GENERATIVE:
        return fused_verdict(name, kind, model, inputs, target, reason)
    if reason or not close(CRITERION(logits, target), cross_entropy(logits, target)):
        return Verdict(name, kind, "WRONG", reason or "from its logits")
    return Verdict(name, kind, "logits", "")


def fused_verdict(name: str, kind: str, model, inputs: dict, target, reason: str) -> Verdict:
    try:
        expected = cross_entropy(model(**inputs).logits, target)
        true = gradients(model, expected)
    except Exception as error:
        return Verdict(name, kind, "not built", "it cannot be trained: " + one_line(error))
    try:
        loss, _ = head_loss(model, CRITERION, target, **inputs)
    except Exception as error:
        if not isinstance(error, (TypeError, ValueError)):
            return Verdict(name, kind, "WRONG", one_line(error))
        if not close(CRITERION(model(**inputs).logits, target), expected):
            return Verdict(name, kind, "WRONG", "from its logits")
        return Verdict(name, kind, "logits", one_line(error))
    if not close(loss, expected):
        return Verdict(name, kind, "WRONG", f"fused: {loss.item()} for {expected.item()}")
    found = gradients(model, loss)
    for parameter in true.keys() | found.keys():
        if parameter not in true or parameter not in found:
            return Verdict(name, kind, "WRONG", f"one gradient of {parameter}")
        error = (found[parameter] - true[parameter]).norm()
        if not error <= 100 * TOLERANCE * true[parameter].norm() + 1e-6:
            return Verdict(name, kind, "WRONG", f"gradient of {parameter}: {error}")
    return Verdict(name, kind, "fused", reason)


@torch.no_grad()
def sharpen(model) -> None:
    """A head that is sure of something, and that meets its cap."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None and not isinstance(head, torch.nn.Embedding):
        for parameter in head.parameters():
            parameter.mul_(30)


def inputs_of(model, kind: str) -> dict:
    takes = inspect.signature(model.forward).parameters
    inputs: dict = {"input_ids": IDS}
    if "input_features" in takes and "input_ids" not in takes:
        config = model.config
        bins = getattr(config, "num_mel_bins", None) or config.input_feat_per_channel
        length = 2 * getattr(config, "max_source_positions", 32)
        shape = (2, bins, length) if "Whisper" in type(model).__name__ else (2, length, bins)
        inputs = {"input_features": torch.randn(shape, generator=torch.Generator().manual_seed(1))}
    if "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = F.pad(IDS, (1, 0), value=1)[:, :-1]
    if "use_cache" in takes:
        inputs["use_cache"] = False
    return inputs


@torch.no_grad()
def target_of(model, inputs: dict, logits, labels, kind: str) -> tuple[torch.Tensor, str]:
    """(the target that the model's own loss is of, a remark): next tokens, or the labels' own."""
    ways = {"": next_tokens(labels), "its labels are aligned with its logits": labels}
    if kind == "encoder-decoder":
        ways = {"": labels, "its labels are next tokens": next_tokens(labels)}
    elif kind not in GENERATIVE:
        ways = {"": labels}
    try:
        own = model(**inputs, labels=labels).loss
        remark = (
            "it has no loss of its own" if own is None else f"its own loss is another: {own:.4f}"
        )
    except Exception as error:
        own, remark = None, "its own loss raises: " + one_line(error)
    for reason, target in ways.items():
        in_range = int(target.max()) < logits.shape[-1]
        if own is not None and in_range and close(own, cross_entropy(logits, target)):
            return target, reason
    return ways[""], remark


def cross_entropy(logits, target):
    return F.cross_entropy(logits.double().flatten(0, -2), target.flatten())


def gradients(model, loss) -> dict:
    model.zero_grad()
    loss.backward()
    return {
        n: p.grad.clone().double()
        for n, p in model.named_parameters()
        if p.grad is not None and bool(p.grad.any())
    }


def close(value, expected) -> bool:
    return bool(abs(value.double() - expected) <= TOLERANCE * abs(expected) + 1e-7)


def one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[-1].strip()}"[:200]


HEAD = """# Model classes

What segloss does with every causal, conditional, encoder-decoder, token and sequence classification
class of transformers {version}, tried on a tiny random model of it ({counts}).
Written by `python tests/models/sweep.py > docs/models.md`; `make test-models` compares.

- **fused**: `head_loss` gives the value and the gradients of the cross-entropy of the model's own
  logits, which are never made. That is the model's own loss, but where the remark says otherwise.
- **logits**: a loss takes `model(...).logits`; the value is that of the model's own loss.
- **refused**: not a matrix of logits per place.
- **not built**: no tiny model of it runs on token ids alone here; nothing is said of the class.

| class | labels | verdict | remark |
|---|---|---|---|
"""


def main() -> None:
    verdicts = [verdict_of(name, kind) for kind, names in classes().items() for name in names]
    found = [verdict.verdict for verdict in verdicts]
    counts = ", ".join(f"{found.count(word)} {word}" for word in dict.fromkeys(sorted(found)))
    print(HEAD.format(version=transformers.__version__, counts=counts), end="")
    for verdict in verdicts:
        print(verdict.row())


if __name__ == "__main__":
    import warnings

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    main()

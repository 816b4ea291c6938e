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
from segloss.integrations.transformers import compute_loss_func, fuse_loss, next_tokens

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
    generative = kind in GENERATIVE
    try:
        model = tiny_model(name, **({} if generative else {"num_labels": 5}))
        inputs = inputs_of(model, kind)
        labels = torch.tensor([1, 3]) if kind == "sequence" else LABELS.remainder(5)
        labels = LABELS if generative else labels
        with torch.no_grad():
            logits = model(**inputs).logits
    except Exception as error:
        return Verdict(name, kind, "not built", one_line(error))
    if logits.shape[:-1] != labels.shape or int(labels.max()) >= logits.shape[-1]:
        return Verdict(name, kind, "refused", f"its logits have shape {tuple(logits.shape)}")
    sharpen(model)
    try:
        own, remark = own_loss(model, inputs, labels)
        shift = None if own is not None else kind in ("causal", "conditional")
        if own is None:
            target = next_tokens(labels) if shift else labels
            own = cross_entropy(model(**inputs).logits, target)
        true = gradients(model, own)
    except Exception as error:
        return Verdict(name, kind, "not built", "it cannot be trained: " + one_line(error))
    if not generative:
        wrong = difference(model, from_logits(model, inputs, labels, shift), own, true)
        return Verdict(name, kind, "WRONG" if wrong else "logits", wrong or remark)
    fused = None
    try:
        fused = fuse_loss(model, CRITERION, shift=shift)
        loss = model(**inputs, labels=labels).loss
    except (TypeError, ValueError) as error:
        if fused is not None:
            fused.remove()
        return logits_verdict(name, kind, model, inputs, labels, one_line(error))
    except Exception as error:
        return Verdict(name, kind, "WRONG", one_line(error))
    fused.remove()
    wrong = difference(model, loss, own, true)
    if wrong:
        return Verdict(name, kind, "WRONG", "fused: " + wrong)
    if kind == "encoder-decoder" and fused.shift.known:
        remark = remark or "its labels are next tokens"
    if kind != "encoder-decoder" and not fused.shift.known:
        remark = remark or "its labels are aligned with its logits"
    return Verdict(name, kind, "fused", remark)


def logits_verdict(name: str, kind: str, model, inputs: dict, labels, reason: str) -> Verdict:
    """Of a model that refuses: cross-entropy at the places that the user names."""
    shift = kind in ("causal", "conditional")
    target = next_tokens(labels) if shift else labels
    expected = cross_entropy(model(**inputs).logits, target)
    found = CRITERION(model(**inputs).logits, target)
    if not close(found, expected):
        return Verdict(name, kind, "WRONG", f"from its logits: {found} for {expected}")
    return Verdict(name, kind, "logits", reason)


def own_loss(model, inputs: dict, labels) -> tuple[torch.Tensor | None, str]:
    """(what the model itself makes of the labels, a remark): None where it makes nothing."""
    try:
        own = model(**inputs, labels=labels).loss
    except Exception as error:
        return None, "its own loss raises: " + one_line(error)
    return own, "it has no loss of its own" if own is None else ""


def from_logits(model, inputs: dict, labels, shift: bool | None) -> torch.Tensor:
    outputs = model(**inputs)
    return compute_loss_func(CRITERION, shift=shift)(outputs, labels)


def difference(model, loss, own, true: dict) -> str:
    """What is not the model's own, "" where all is."""
    if not close(loss, own.double()):
        return f"{loss.item()} for {own.item()}"
    found = gradients(model, loss)
    for parameter in true.keys() | found.keys():
        if parameter not in true or parameter not in found:
            return f"one gradient of {parameter}"
        error = (found[parameter] - true[parameter]).norm()
        if not error <= 100 * TOLERANCE * true[parameter].norm() + 1e-6:
            return f"gradient of {parameter}: {error}"
    return ""


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

- **fused**: with `fuse_loss(model, CrossEntropyLoss())` the model's loss and each of its gradients
  are those of its own loss, the logits never made; where its labels stand is found out.
- **logits**: by `compute_loss_func(CrossEntropyLoss())` a classifier's loss and gradients are those
  of its own loss; or, with the reason that `fuse_loss` gives, a loss takes `model(...).logits`.
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

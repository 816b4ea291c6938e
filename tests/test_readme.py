"""The README holds: its code runs, its output is real, its commands and names exist.

The blocks under one `## ` heading are one program, run from top to bottom in a namespace of its
own; a block of text after a block of Python is what that block prints.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from helpers import LOSSES

import segloss
from segloss.losses import LOSSES as SHORT_NAMES
from segloss.losses import parse_loss

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in PAGES}
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SECTION = re.compile(r"^## (.+?)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
SECTIONS = {
    (page, heading): section
    for page, text in TEXTS.items()
    for heading, section in SECTION.findall(text)
}
WITH_CODE = [place for place, text in SECTIONS.items() if BLOCK.search(text)]


def run(page: str, heading: str) -> dict:
    """The namespace that the section's blocks leave behind, its printed output compared."""
    namespace: dict = {}
    printed = ""
    for kind, code in BLOCK.findall(SECTIONS[page, heading]):
        if kind == "text":
            assert printed == code
            continue
        # its lines' numbers in a traceback are those of the page
        start = TEXTS[page][: TEXTS[page].index(code)].count("\n")
        program = compile("\n" * start + code, page, "exec")
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(program, namespace)
        printed = output.getvalue()
    return namespace


@pytest.mark.parametrize("page", TEXTS)
def test_every_block_is_found(page):
    text = TEXTS[page]
    blocks = [BLOCK.findall(part) for (where, _), part in SECTIONS.items() if where == page]
    assert sum(map(len, blocks)) == len(BLOCK.findall(text))
    assert text.count("\n```") == 2 * len(BLOCK.findall(text))


# transformers itself warns
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("page", "heading"), WITH_CODE)
def test_code_runs(page, heading, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where trainers leave their folders
    run(page, heading)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("fused", [False, True], ids=["compute_loss_func", "LossTrainer"])
def test_hugging_face_loop_trains_like_the_model_itself(fused, tmp_path):
    """Both ways, with accumulation and micro-batches of unequal length, step like transformers'."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    namespace = run("README.md", "Replace one line")
    criterion = segloss.CrossEntropyLoss()

    def weights(trainer_class, **options):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        rows = torch.randint(61, (4, 9), generator=torch.Generator().manual_seed(1))
        labels = rows.masked_fill(torch.arange(9) < torch.tensor([[1], [6], [3], [4]]), -100)
        data = [{"input_ids": x, "labels": y} for x, y in zip(rows, labels, strict=True)]
        arguments = TrainingArguments(
            tmp_path / trainer_class.__name__, max_steps=2, per_device_train_batch_size=2,
            gradient_accumulation_steps=2, learning_rate=0.1, optim="sgd",
            lr_scheduler_type="constant", max_grad_norm=0.0, use_cpu=True, report_to=[],
            save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer_class(model=model, args=arguments, train_dataset=data, **options).train()
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    if fused:
        ours = weights(namespace["LossTrainer"], loss=criterion)
    else:
        ours = weights(Trainer, compute_loss_func=namespace["compute_loss_func"](criterion))
    torch.testing.assert_close(ours, weights(Trainer), rtol=1e-5, atol=1e-6)


def test_table_names_every_loss():
    for name in LOSSES:
        rows = re.findall(rf"^\| `{name}` \| `(\w+)` \|", README, re.MULTILINE)
        assert len(rows) == 1, f"{name} has {len(rows)} rows"
        assert SHORT_NAMES[rows[0]].function == name


def test_stated_facts_about_gradients():
    """What the table derives: DFT is GCE with q = 1, and where self-adjusting Dice is least."""
    logits = torch.randn(40, 30, dtype=torch.float64, requires_grad=True)
    target = torch.randint(30, (40,))
    dft, gce = (
        torch.autograd.grad(loss(logits, target), logits)[0]
        for loss in (segloss.DFTLoss(), segloss.GeneralizedCrossEntropyLoss(q=1))
    )
    torch.testing.assert_close(dft, gce)

    p = torch.linspace(0.01, 0.999, 2000, dtype=torch.float64)
    two = torch.stack([p, 1 - p], -1).log()
    zero = torch.zeros(len(p), dtype=torch.int64)

    def least(loss) -> float:
        return p[loss(two, zero).argmin()].item()

    for alpha in (0.1, 0.5, 1.0):
        sadl = segloss.SelfAdjustingDiceLoss(alpha=alpha, reduction="none")
        assert least(sadl) == pytest.approx(1 / (1 + alpha), abs=1e-3)
    sadl, ce = (
        segloss.SelfAdjustingDiceLoss(alpha=1.0, reduction="none"),
        segloss.CrossEntropyLoss(reduction="none"),
    )
    assert least(0.44 * ce + 0.56 * sadl) == p[-1]
    assert least(0.42 * ce + 0.58 * sadl) < 0.995


COMMANDS = [
    line.partition("#")[0].strip()
    for text in TEXTS.values()
    for line in re.findall(r"^    (.+)$", text, re.MULTILINE)
    if line.startswith(("make ", "segloss ", "torchrun "))
]


@pytest.mark.parametrize("command", [c for c in COMMANDS if "segloss " in c])
def test_command_line_is_accepted(command):
    from segloss.compare.command import CompareOptions, variants_of, varied
    from segloss.train.config import Options, settings
    from segloss.train.select import SelectOptions

    name, *words = shlex.split(command)[shlex.split(command).index("segloss") + 1 :]
    assert name in ("train", "evaluate", "select", "compare", "report", "doctor")
    if name == "compare":
        words, vary = varied(words)
        variants = variants_of(words, vary, settings(words, options=CompareOptions))
        assert len(variants) == math.prod(len(values) - 1 for values in vary.values())
    if name not in ("train", "select") or "--resume" in words:
        return
    if "--config" in words:  # a file of the reader's
        del words[words.index("--config") : words.index("--config") + 2]
    found = settings(words, options=SelectOptions if name == "select" else Options)
    if found.options.loss is not None:
        parse_loss(found.options.loss)


def test_make_targets_exist_and_the_gate_is_the_stated_one():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = {command.split()[1] for command in COMMANDS if command.startswith("make ")}
    assert named <= targets
    (gate,) = re.findall(r"^make .*$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert f"`{gate}`" in README
    assert {"lint", "test"} <= set(gate.split())


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)#:]+)\)", TEXTS[path.name]):
        assert (path.parent / link).exists(), link


def test_examples_of_rows_are_read():
    import json

    from segloss.train.data import checked

    lines = re.findall(r'^    (\{".*\})$', TEXTS["training.md"], re.MULTILINE)
    rows = [checked(json.loads(line), "mine", "text", chat=True) for line in lines]
    assert [row["answer"] for row in rows] == ["Hello", " blue", "Hello", "blue", None]
    assert rows[1]["options"] == [" blue", " red"]


def test_no_page_names_a_stranger_s_package():
    for text in TEXTS.values():
        assert "pip install segloss" not in text

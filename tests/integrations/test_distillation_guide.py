"""docs/distillation.md holds: its code runs, and does what the text around it says."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "distillation.md"
TEXT = PAGE.read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))


def run(heading: str) -> dict:
    """What the section's blocks define, run one after the other."""
    names: dict = {}
    for code in re.findall(r"^```python\n(.*?)^```$", SECTIONS[heading], re.MULTILINE | re.DOTALL):
        start = TEXT[: TEXT.index(code)].count("\n")  # lines of a traceback are the page's
        exec(compile("\n" * start + code, str(PAGE), "exec"), names)
    return names


def test_the_student_learns_what_the_two_losses_ask():
    """Against the formula on full logits, before and after the ten steps."""
    names = run("From a bigger model")
    student, teacher, ids = names["student"], names["teacher"], names["ids"]
    torch.manual_seed(0)
    values = []
    with torch.no_grad():
        q = (teacher(ids).logits[:, :-1, :100] / 2).log_softmax(-1).flatten(0, 1)
        for model in (type(student)(student.config), student):
            logits = model(ids).logits[:, :-1].flatten(0, 1)
            hard = F.cross_entropy(logits, ids[:, 1:].flatten())
            kl = F.kl_div((logits / 2).log_softmax(-1), q, log_target=True, reduction="batchmean")
            values.append(0.5 * hard + 0.5 * kl)
    assert values[1] < 0.9 * values[0]


def test_stored_probabilities_are_those_of_the_teacher_spread_out():
    names = run("From stored probabilities")
    ids, log_prob = names["ids"], names["log_prob"]
    q = torch.full((4, 16, 100), 0.0)
    q += ((1 - log_prob.exp().sum(-1)) / 92)[..., None]
    q.scatter_(-1, ids, log_prob.exp())
    logits = (names["hidden"] @ names["head"].T).detach()
    p = (logits / 2).log_softmax(-1)
    q = (q.log() / 2).log_softmax(-1)
    kl = (q.exp() * (q - p)).sum(-1).mean()
    hard = F.cross_entropy(logits.flatten(0, 1), names["target"].flatten())
    torch.testing.assert_close(names["loss"].detach(), 0.5 * hard + 0.5 * kl, rtol=1e-5, atol=0)
    assert names["hidden"].grad is not None and names["head"].grad is not None


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_the_trainer_learns_from_the_columns(tmp_path, monkeypatch):
    """Its loss is that of the two lists, renormalised at temperature 2."""
    monkeypatch.chdir(tmp_path)
    names = run("As columns of the data")
    assert names["trainer"].state.global_step == 3
    model, row = names["model"].eval(), names["row"]
    with torch.no_grad():
        logits = model(torch.tensor([row["input_ids"]])).logits[0]
    terms = []
    for place in (2, 3):
        hard = -logits[place - 1].log_softmax(-1)[row["labels"][place]]
        log_p = (logits[place - 1] / 2).log_softmax(-1)[row["teacher_ids"][place]]
        log_q = (torch.tensor(row["teacher_log_prob"][place]) / 2).log_softmax(-1)
        terms.append(0.5 * hard + 0.5 * (log_q.exp() * (log_q - log_p)).sum())
    found = names["trainer"].evaluate([row])["eval_loss"]
    assert found == pytest.approx(torch.stack(terms).mean().item(), rel=1e-5)


def test_policy_gradient_and_unlikelihood():
    names = run("Log-probabilities of several answers")
    logits = names["logits"].detach()
    log_p = logits.log_softmax(-1).gather(-1, names["answers"])
    expected = -(names["advantage"] * log_p).mean()
    torch.testing.assert_close(names["policy_loss"].detach(), expected, rtol=1e-5, atol=1e-7)
    unlike = -torch.log1p(-log_p.exp()).sum(-1).mean()
    expected = F.cross_entropy(logits, names["first"]) + 0.1 * unlike
    torch.testing.assert_close(names["value"].detach(), expected, rtol=1e-5, atol=1e-7)


def test_the_table_names_every_divergence():
    from segloss.losses.distillation import KINDS
    from segloss.sources.beside import RESTS

    assert re.findall(r'^\| `"(\w+)"`', TEXT, re.MULTILINE) == [*KINDS, *RESTS]

"""docs/integrations.md holds: every block of code runs, on what the first one makes."""

import re
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("trl")
pytest.importorskip("datasets")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "integrations.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HEAD, *SECTIONS = re.split(r"^## ", TEXT, flags=re.MULTILINE)
WITH_CODE = [section for section in SECTIONS if BLOCK.search(section)]


def run(text, namespace):
    for code in BLOCK.findall(text):
        start = TEXT[: TEXT.index(code)].count("\n")  # lines of a traceback are the page's
        exec(compile("\n" * start + code, str(PAGE), "exec"), namespace)


# the libraries' own
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("section", WITH_CODE, ids=lambda text: text.split("\n")[0])
def test_code_runs(section, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    run(HEAD, namespace)
    before = {k: v.clone() for k, v in namespace["model"].state_dict().items()}
    run(section, namespace)
    metrics = namespace.get("metrics", {"eval_nll": 1.0, "eval_loss": 0.5})
    assert metrics["eval_nll"] > metrics["eval_loss"] > 0
    trained = namespace.get("classifier", namespace["model"])
    after = trained.state_dict()
    changed = trained is not namespace["model"] or any(
        not after[name].equal(value) for name, value in before.items()
    )
    assert changed


def test_one_table_says_which_line():
    """Every public name of the integrations stands in it."""
    from segloss.integrations import transformers as ours
    from segloss.integrations import trl

    table = HEAD[HEAD.index("| you use") : HEAD.index("Everything below")]
    hooks = {
        "CoBaCallback",
        "SavedState",
        "head_logits",
        "head_outputs",
        "next_tokens",
        "unwrapped",
    }
    for name in (set(ours.__all__) - hooks) | (set(trl.__all__) - {"add_fused_lm_head"}):
        assert name in table, name

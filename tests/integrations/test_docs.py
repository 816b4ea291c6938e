"""The README names every way there is; tests/test_readme.py runs the code of its guide."""

from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("trl")
pytest.importorskip("datasets")

PAGE = Path(__file__).resolve().parents[2] / "README.md"


def test_one_table_says_which_line():
    """Every public name of the integrations stands in it."""
    from segloss.integrations import transformers as ours
    from segloss.integrations import trl

    text = PAGE.read_text(encoding="utf-8")
    table = text[text.index("| you use") : text.index("## Train from")]
    hooks = {"CoBaCallback", "SavedState", "next_tokens", "unwrapped"}
    hooks |= {"head_logits", "head_outputs"}  # for what `head_loss` does
    for name in (set(ours.__all__) - hooks) | (set(trl.__all__) - {"add_fused_lm_head"}):
        assert name in table, name

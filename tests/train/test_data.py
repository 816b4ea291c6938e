"""Every format, token by token against text written by hand; every faulty row by file and line."""

import json
import shutil

import pytest
from train.tiny import write_jsonl

from segloss.train.config import settings
from segloss.train.errors import UserError
from segloss.train.run import Run

EOS = "<eos>"
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}!{% endgeneration %}{% else %}{{ m.content }}!{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def chat_folder(model_folder, tokenizer, tmp_path_factory):
    import copy

    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(model_folder, folder)
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = CHAT
    chatty.save_pretrained(folder)
    return folder


def prepared(model, files, *options):
    words = ["--model", str(model), "--eval-items", "0", "--steps", "2", "--batch-size", "2"]
    words += ["--max-length", "1024"]
    words += [str(option) for option in options]
    return Run(settings([*words, *(["--data", *map(str, files)] if files else [])]))


def spelled(tokenizer, ids):
    """The text of some tokens; the end of text is written out."""
    return "".join(
        EOS if token == tokenizer.eos_token_id else tokenizer.decode([token]) for token in ids
    )


def trained_parts(tokenizer, row):
    """(the whole text, the parts of it that carry loss) of a row that the trainer has tokenised."""
    parts, current = [], []
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (token, -100)
        if label == -100 and current:
            parts.append(spelled(tokenizer, current))
            current = []
        elif label != -100:
            current.append(token)
    if current:
        parts.append(spelled(tokenizer, current))
    return spelled(tokenizer, row["input_ids"]), parts


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


TALK = turns(("user", "hi"), ("assistant", "ho"), ("user", "so"), ("assistant", "la"))
# name: (rows, options, the text, what of it carries loss)
CHATS = {
    "messages": ({"messages": TALK}, (), "<user>hi!<assistant>ho!<user>so!<assistant>la!", None),
    "assistant-only": (
        {"messages": TALK},
        ("--assistant-only-loss",),
        "<user>hi!<assistant>ho!<user>so!<assistant>la!",
        ["ho!", "la!"],
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
        ("--assistant-only-loss",),
        "<user>hi!<assistant>ho!",
        ["ho!"],
    ),
    "conversational prompt": (
        {"prompt": TALK[:3], "completion": TALK[3:]},
        (),
        "<user>hi!<assistant>ho!<user>so!<assistant>la!",
        ["la!"],
    ),
    "alpaca with a template": (
        {"instruction": "add", "input": "1 2", "output": "3"},
        (),
        "<user>add\n1 2!<assistant>3!",
        ["3!"],
    ),
}
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\nadd\n\n### Response:\n"
)
PAIRED = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\nadd"
    "\n\n### Input:\n1 2\n\n### Response:\n"
)
TEXTS = {
    "text": ({"text": "abc"}, (), "abc" + EOS, None),
    "another text field": (
        {"story": "abc"},
        ("--dataset_text_field", "story"),
        "abc" + EOS,
        None,
    ),
    "prompt and completion": (
        {"prompt": "ab", "completion": " c"},
        (),
        "ab c" + EOS,
        [" c" + EOS],
    ),
    "everything": (
        {"prompt": "ab", "completion": " c"},
        ("--completion-only-loss", "false"),
        "ab c" + EOS,
        None,
    ),
    "alpaca": ({"instruction": "add", "output": "3"}, (), f"{ALPACA}3{EOS}", ["3" + EOS]),
    "alpaca with input": (
        {"instruction": "add", "input": "1 2", "output": "3"},
        (),
        f"{PAIRED}3{EOS}",
        ["3" + EOS],
    ),
    "tokens": ({"input_ids": [64, 65, 66], "labels": [-100, 65, 66]}, (), None, None),
}


def assert_trained_on(run, tokenizer, text, parts):
    row = run.trainer.train_dataset[0]
    if text is None:
        assert (row["input_ids"], row["labels"]) == ([64, 65, 66], [-100, 65, 66])
    else:
        assert trained_parts(tokenizer, row) == (text, [text] if parts is None else parts)
    batch = run.trainer.data_collator([row, row])
    assert batch["labels"].tolist() == [row["labels"]] * 2
    run.trainer.train()
    assert run.trainer.state.global_step == 2


@pytest.mark.parametrize("name", CHATS)
def test_conversations(chat_folder, tokenizer, tmp_path, name):
    row, options, text, parts = CHATS[name]
    file = write_jsonl(tmp_path / "mine.jsonl", [row, row | {"task": "x"}])
    run = prepared(chat_folder, [file], "--output", tmp_path / "run", *options)
    assert run.data.tasks == ["mine", "x"]
    assert_trained_on(run, tokenizer, text, parts)


@pytest.mark.parametrize("name", TEXTS)
def test_texts(model_folder, tokenizer, tmp_path, name):
    row, options, text, parts = TEXTS[name]
    file = write_jsonl(tmp_path / "mine.jsonl", [row, row | {"task": "x"}])
    if name.startswith("alpaca"):  # the tiny model has few positions
        model_folder = shutil.copytree(model_folder, tmp_path / "model")
        config = json.loads((model_folder / "config.json").read_text())
        config["max_position_embeddings"] = 1024
        (model_folder / "config.json").write_text(json.dumps(config))
    run = prepared(model_folder, [file], "--output", tmp_path / "run", *options)
    assert_trained_on(run, tokenizer, text, parts)


ROWS = [{"prompt": f"{i}:", "completion": " yes", "weight": i + 0.5} for i in range(3)]


def as_csv(folder):
    path = folder / "mine.csv"
    lines = [f"{row['prompt']},{row['completion']},{row['weight']}" for row in ROWS]
    path.write_text("prompt,completion,weight\n" + "\n".join(lines) + "\n")
    return path


def as_json(folder):
    path = folder / "mine.json"
    path.write_text(json.dumps(ROWS, indent=1))
    return path


def as_parquet(folder):
    from datasets import Dataset

    Dataset.from_list(ROWS).to_parquet(folder / "mine.parquet")
    return folder / "mine.parquet"


def as_saved(folder):
    from datasets import Dataset

    Dataset.from_list(ROWS).save_to_disk(folder / "mine")
    return folder / "mine"


def as_splits(folder):
    from datasets import Dataset, DatasetDict

    parts = {"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:1])}
    DatasetDict(parts).save_to_disk(folder / "mine")
    return folder / "mine"


@pytest.mark.parametrize(
    "write", [as_csv, as_json, as_parquet, as_saved, as_splits, lambda folder: write_jsonl(
        folder / "mine.jsonl", ROWS)],
    ids=["csv", "json", "parquet", "saved", "splits", "jsonl"],
)  # fmt: skip
def test_files(model_folder, tokenizer, tmp_path, write):
    run = prepared(model_folder, [write(tmp_path)], "--output", tmp_path / "run")
    rows = run.trainer.train_dataset
    found = {trained_parts(tokenizer, row)[0]: row["sample_weights"] for row in rows}
    expected = {f"{row['prompt']} yes{EOS}": row["weight"] for row in ROWS}
    if write is as_splits:  # what is in the test split is not trained on
        expected.pop(f"0: yes{EOS}")
        assert run.held_out == []  # --eval-items 0
    assert found == expected and run.data.tasks == ["mine"]


def test_a_file_has_no_splits(model_folder, tmp_path):
    """Those of a hub id beside it, or of a file of settings, are not looked for in it."""
    run = prepared(model_folder, [as_parquet(tmp_path)], "--dataset-train-split", "train_sft")
    assert run.data.counts["mine"]["train"] == len(ROWS)


def test_a_tokenizer_that_ends_texts_itself(model_folder, tokenizer, tmp_path):
    """Generation starts from the prompt, not from an end of text after it."""
    import copy

    from tokenizers.processors import TemplateProcessing

    folder = shutil.copytree(model_folder, tmp_path / "model")
    ending = copy.deepcopy(tokenizer)
    ending.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, tokenizer.eos_token_id)]
    )
    ending.save_pretrained(folder)
    file = write_jsonl(
        tmp_path / "a.jsonl", [{"prompt": f"{i}", "completion": " y"} for i in "abcd"]
    )
    run = prepared(folder, [file], "--eval-items", 1, "--output", tmp_path / "run")
    (item,) = run.held_out
    assert len(item["prompt_ids"]) == 1 and tokenizer.eos_token_id not in item["prompt_ids"]
    text, parts = trained_parts(tokenizer, run.trainer.train_dataset[0])
    assert text.endswith(f" y{EOS}") and parts == [f" y{EOS}"]
    run = prepared(folder, [file], "--packing", "--max-length", 64, "--output", tmp_path / "run")
    (ids,) = run.trainer.train_dataset["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 4 and len(ids) == 4 * 4


def test_token_weights(model_folder, tmp_path):
    """One per token of the row, the end of text included; other numbers of them are refused."""
    row = {"prompt": "ab", "completion": " c", "token_weight": [0, 0, 1, 2, 3]}
    file = write_jsonl(tmp_path / "mine.jsonl", [row])
    run = prepared(model_folder, [file], "--output", tmp_path / "run")
    (found,) = run.trainer.train_dataset["token_weight"]
    assert found == [0, 0, 1, 2, 3] and len(run.trainer.train_dataset[0]["input_ids"]) == 5
    file = write_jsonl(tmp_path / "mine.jsonl", [row | {"token_weight": [1, 2]}])
    with pytest.raises(UserError, match=r"mine.jsonl, line 1: it has 2 token_weight for 5 tokens"):
        prepared(model_folder, [file], "--output", tmp_path / "run")


@pytest.mark.parametrize("name", ["input_ids", "labels"])
def test_tokens_that_the_model_has_not(model_folder, tmp_path, name):
    row = {"input_ids": [64, 65, 66], "labels": [-100, 65, 66]}
    file = write_jsonl(tmp_path / "mine.jsonl", [row, row | {name: [64, 65, 999]}])
    with pytest.raises(UserError, match=f"mine.jsonl, line 2: {name} has the token 999; the model"):
        prepared(model_folder, [file], "--output", tmp_path / "run")


GOOD = '{"prompt": "p", "completion": " c"}'
ODD = {
    "not JSON": ('{"prompt": "p"', "line 2: not JSON (Expecting ',' delimiter at column 15)"),
    "not an object": ("[1]", "line 2: an object is needed, not [1]"),
    "half a pair": ('{"prompt": "p"}', "line 2: there is 'prompt'; a row has messages, "),
    "number for text": (
        '{"prompt": "p", "completion": 3}',
        'line 2: "prompt" and "completion" must both be strings or both be messages',
    ),
    "empty": (
        '{"prompt": "p", "completion": " "}',
        "line 2: \"completion\" has ' ', where it takes text that is not blank",
    ),
    "surrogate": (
        '{"prompt": "\\ud800", "completion": "c"}',
        "\"prompt\" has '\\ud800', where it takes text",
    ),
    "options without the answer": (
        '{"prompt": "p", "completion": " c", "options": ["a", "b"]}',
        'line 2: the answer is none of the "options"',
    ),
    "one option": (
        '{"prompt": "p", "completion": " c", "options": ["c"]}',
        'line 2: "options" are two or more',
    ),
    "options of a text": ('{"text": "p", "options": ["a", "b"]}', "and go with a completion"),
    "negative weight": (
        '{"prompt": "p", "completion": " c", "weight": -1}',
        'line 2: "weight" has -1, where it takes a number from 0 up',
    ),
    "no role": (
        '{"messages": [{"content": "x"}]}',
        'line 2: "messages" has {\'content\': \'x\'}, where it takes {"role": ..., "content": ...}',
    ),
    "picture in a message": (
        '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
        "\"messages\" has {'content': [{'type': 'image'}], 'role': 'user'}, where it takes {",
    ),
    "nested": ("[" * 100_000, "line 2: not JSON that can be read (nested too deeply)"),
    "labels of another length": (
        '{"input_ids": [1, 2], "labels": [1]}',
        'line 2: there are 2 "input_ids" and 1 "labels"',
    ),
    "a label below 0": (
        '{"input_ids": [1, 2], "labels": [-1, 2]}',
        'line 2: "labels" has -1, where it takes tokens, or -100 for none',
    ),
    "a token below 0": (
        '{"input_ids": [1, -100]}',
        'line 2: "input_ids" has -100, where it takes whole numbers from 0 up',
    ),
    "another shape": ('{"text": "x"}', "some rows have prompt, some text; a run takes one of them"),
    "weight in some": (
        '{"prompt": "q", "completion": " c", "weight": 1}',
        "1 of 2 rows have a weight; all or none must",
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_rows(train, tmp_path, name):
    line, message = ODD[name]
    path = tmp_path / "odd.jsonl"
    path.write_text(f"{GOOD}\n{line}\n")
    code, out, err = train("--data", path, "--eval-items", 0)
    last = err.strip().splitlines()[-1]
    assert code == 2 and out == "" and last.startswith("segloss: error: ") and message in last, err
    assert ("line 2" in message) <= (f"{path}, line 2" in last)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("odd.jsonl", b'{"prompt": "\xff"}', "line 1: not UTF-8 (invalid start byte at byte 13)"),
        ("odd.json", b'[{"prompt": "p",\n', "odd.json, line 2: not JSON (Expecting property name"),
        ("odd.csv", b"prompt,completion\na\n", "line 2: it has fewer cells than the first line"),
        ("odd.csv", b'prompt,completion\n"a,b\n', "line 2: not CSV (unexpected end of data)"),
        (
            "odd.csv",
            b"prompt,completion\na,\xff\n",
            "line 2: not UTF-8 (invalid start byte at byte 3)",
        ),
        ("odd.csv", b"text,weight\na,b\n", "line 2, weight: not JSON"),
        ("odd.parquet", b"PAR1", "cannot read "),
        ("odd.txt", b"text", "it takes .jsonl, .json, .csv, .tsv and .parquet files"),
        ("empty.jsonl", b"\n\n", "the data hold no rows"),
    ],
)
def test_odd_files(train, tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    code, out, err = train("--data", path, "--eval-items", 0)
    last = err.strip().splitlines()[-1]
    assert code == 2 and out == "" and message in last and "Traceback" not in err, err


@pytest.mark.parametrize("weights", [{"weight": 0}, {"token_weight": [0, 0, 0, 0]}])
def test_rows_that_all_weigh_nothing_are_refused(train, tmp_path, weights):
    rows = [{"prompt": f"{i}", "completion": " c", **weights} for i in range(4)]
    path = write_jsonl(tmp_path / "mine.jsonl", rows)
    code, out, err = train("--data", path, "--eval-items", 1)
    assert code == 2 and out == "" and "every row to train on weighs 0; at least one needs" in err


def test_columns_that_nothing_reads_are_named(train, tmp_path):
    rows = [{"prompt": f"{i}", "completion": " c", "optons": ["a"], "id": i} for i in range(4)]
    path = write_jsonl(tmp_path / "mine.jsonl", rows)
    code, _, err = train("--data", path, "--eval-items", 1)
    assert code == 0
    assert f"{path}: columns that nothing reads: optons (did you mean options?), id" in err


def test_repeated_rows_are_counted_and_prompts_stay_together(model_folder, tmp_path, capsys):
    rows = [{"prompt": f"{i % 10}", "completion": f" {i % 20}"} for i in range(40)]
    file = write_jsonl(tmp_path / "mine.jsonl", rows)
    run = prepared(
        *(model_folder, [file], "--eval-items", 6, "--validation-items", 4),
        *("--output", tmp_path / "run"),
    )
    assert (
        "mine: 40 rows, 20 repeated, 10 train, 6 held out, 4 validation" in capsys.readouterr().err
    )
    parts = [run.trainer.train_dataset["prompt"], [i["prompt"] for i in run.data.held_out]]
    parts.append([row["prompt"] for row in run.data.validation])
    for i, one in enumerate(parts):
        for two in parts[i + 1 :]:
            assert not set(one) & set(two)


def test_every_answer_has_its_share_of_the_held_out_items(model_folder, tmp_path):
    rows = [{"prompt": f"{i}", "completion": " a" if i % 4 else " b"} for i in range(80)]
    file = write_jsonl(tmp_path / "mine.jsonl", rows)
    run = prepared(model_folder, [file], "--eval-items", 20, "--output", tmp_path / "run")
    answers = [row["answer"] for row in run.data.held_out]
    assert (answers.count(" a"), answers.count(" b")) == (15, 5)


def test_equal_tasks(model_folder, tmp_path):
    files = [
        write_jsonl(
            tmp_path / f"{name}.jsonl",
            [{"prompt": f"{name}{i}", "completion": " y"} for i in range(count)],
        )
        for name, count in (("few", 3), ("many", 12))
    ]
    run = prepared(model_folder, files, "--equal-tasks", "--output", tmp_path / "run")
    tasks = run.trainer.train_dataset["task"]
    assert list(tasks).count("few") == list(tasks).count("many") == 12


def test_some_of_the_tasks(model_folder, tmp_path):
    """They are split as they are beside the others, whose rows are left out."""
    rows = [
        {"prompt": f"{i}", "completion": f" {i % 7}", "task": "abc"[i % 3], "group": i // 4}
        for i in range(90)
    ]
    file = write_jsonl(tmp_path / "mine.jsonl", rows)
    options = ("--eval-items", 5, "--validation-items", 3, "--output", tmp_path / "run")
    every, some, one = (
        prepared(model_folder, [file], *options, *words).data
        for words in ((), ("--tasks", "c", "a"), ("--tasks", "c"))
    )
    assert (every.tasks, some.tasks, one.tasks) == (["a", "b", "c"], ["a", "c"], ["c"])
    for data in (some, one):
        for part in ("train", "held_out", "validation"):
            found, there = (list(getattr(of, part)) for of in (data, every))
            assert [{**row, "task_ids": None} for row in found] == [
                {**row, "task_ids": None} for row in there if row["task"] in data.tasks
            ]
            assert {data.tasks[row["task_ids"]] == row["task"] for row in found} == {True}
    with pytest.raises(UserError, match="--tasks has 'd'; the data have a b c"):
        prepared(model_folder, [file], *options, "--tasks", "a", "d")


def test_tools_of_a_later_row(chat_folder, tmp_path):
    """A data set made of rows has the columns of the first one."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    rows = [{"messages": TALK}, {"messages": [*TALK, *TALK], "tools": tools}]
    file = write_jsonl(tmp_path / "mine.jsonl", rows)
    run = prepared(chat_folder, [file], "--output", tmp_path / "run")
    assert sorted(run.data.train["tools"], key=bool) == [None, json.dumps(tools)]
    rows = [rows[0], rows[1] | {"chat_template_kwargs": {"think": True}}]
    file = write_jsonl(tmp_path / "mine.jsonl", rows)
    with pytest.raises(UserError, match="1 of 2 rows have a chat_template_kwargs; all or none"):
        prepared(chat_folder, [file], "--output", tmp_path / "run")


def test_a_stream_is_read_alone(model_folder, tmp_path, monkeypatch):
    from datasets import Dataset, DatasetDict

    def stream(*args, **kwargs):
        assert kwargs["streaming"]
        return DatasetDict({"train": Dataset.from_list(ROWS).to_iterable_dataset()})

    monkeypatch.setattr("segloss.train.data.datasets.load_dataset", stream)
    options = ("--dataset_streaming", "--output", tmp_path / "run")
    assert prepared(model_folder, ["a/b"], *options).data.tasks == []
    for files, words in ((["a/b", "a/c"], ()), (["a/b"], ("--tasks", "a"))):
        with pytest.raises(UserError, match="a/b is a stream; it is read alone and without --tas"):
            prepared(model_folder, files, *options, *words)


def test_rows_that_are_cut_or_left_out_are_counted(train, tmp_path):
    rows = [{"prompt": "x" * n, "completion": " yyy"} for n in range(1, 9)]
    path = write_jsonl(tmp_path / "mine.jsonl", rows)
    code, _, err = train("--data", path, "--eval-items", 0, "--max-length", 6)
    assert code == 0, err
    # with 6 tokens of prompt or more nothing of the answer is left; with 2 to 5 a part of it
    assert "train: 3 rows are left out: no answer fits into --max_length 6" in err
    assert "train: 5 of 5 rows reach --max_length 6 and may be cut" in err
    write_jsonl(path, rows[6:])
    code, _, err = train(
        "--data", path, "--eval-items", 0, "--max-length", 6, "--output", tmp_path / "other"
    )
    assert code == 2 and "train: no row has a label that fits into --max_length 6" in err

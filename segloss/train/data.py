"""Data of `segloss train`: files, saved data sets and hub ids as checked rows, split by task.

A row has one of TRL's shapes, which are left to TRL to tokenise, and columns of our own:

    messages                [{"role": ..., "content": ...}, ...], or ShareGPT's `conversations`
    prompt, completion      two strings, or two lists of messages
    instruction, output     Alpaca's, with or without `input`
    text                    or what `dataset_text_field` says
    input_ids               with or without `labels`

    task, options, group    what it is of; the answers to choose from; what a split keeps together
    weight, token_weight    of the row in the loss; of each of its tokens
    teacher_ids, teacher_log_prob
                            a stored teacher's classes of each token, and their log-probabilities
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import math
import random
import re
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mode
from typing import Any

import datasets
import trl
from accelerate import PartialState

from .config import Settings
from .errors import UserError, first_line, json_rows, parsed, text_of

STORED = ("teacher_ids", "teacher_log_prob")
PER_TOKEN = ("token_weight", *STORED)
LISTS = ("messages", "conversations", "options", "input_ids", "labels", *PER_TOKEN)
SHAPES = "messages, conversations, prompt and completion, instruction and output, input_ids"
KNOWN = {*LISTS, "prompt", "completion", "instruction", "input", "output", "system", "tools"}
KNOWN |= {"task", "group", "weight", "attention_mask", "chat_template_kwargs"}
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
# tokens that an answer may run over the longest expected one, so that its end is seen to be one
SLACK_TOKENS = 4


@dataclass(frozen=True)
class Data:
    """What a run trains on and is evaluated on."""

    tasks: list[str]  # in the order that `task_ids` mean
    train: Any  # a `datasets.Dataset`, or a stream that nothing was checked or held out of
    held_out: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    counts: dict[str, dict[str, int]]
    majority: dict[str, str]  # the most frequent answer of each task's training rows
    answers: dict[str, list[str]]  # of a task whose answers are few and repeat: all of them


def say(text: str) -> None:
    """Progress goes to stderr, of the first process only; stdout holds the results."""
    if not PartialState._shared_state or PartialState().is_main_process:
        print(text, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------ reading


def sources(settings: Settings) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(name, what its splits "train" and "test" hold, the task it is of by its name) of each."""
    script, mixture = settings.script, settings.mixture
    name, splits = script.dataset_name, (script.dataset_train_split, script.dataset_test_split)
    if mixture.datasets:
        yield "datasets", read("datasets", splits, lambda: trl.get_dataset(mixture)), "data"
    elif name:
        options = {"name": script.dataset_config, "streaming": script.dataset_streaming}
        found = read(name, splits, lambda: datasets.load_dataset(name, **options))
        yield name, found, Path(name).stem
    for source in settings.options.data or ():
        yield source, read(source), Path(source).stem


def read(
    source: str,
    splits: tuple[str, str] = ("train", "test"),
    load: Callable[[], Any] | None = None,
) -> dict[str, Any]:
    """Pairs of (where, raw row) of the two splits, or the stream that there is."""
    path = Path(source)
    if path.suffix in (".jsonl", ".ndjson", ".json"):
        return {"train": rows_of_json(source)}
    if path.suffix in (".csv", ".tsv"):
        return {"train": rows_of_csv(source)}
    try:
        if path.suffix == ".parquet":
            found: Any = datasets.load_dataset("parquet", data_files=source)
        elif any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(source)
        else:
            found = load() if load is not None else datasets.load_dataset(source)
    except Exception as error:  # foreign data fail in many ways
        raise UserError(
            f"cannot read {source}: {type(error).__name__}: {first_line(error)} (it takes .jsonl, "
            ".json, .csv, .tsv and .parquet files, folders of data sets and hub ids)"
        ) from None
    found = found if isinstance(found, dict) else {splits[0]: found}
    if splits[0] not in found:
        raise UserError(f"{source} has the splits {', '.join(found)}, none called {splits[0]}")
    if isinstance(found[splits[0]], datasets.IterableDataset):
        return {"stream": found[splits[0]]}
    return {
        name: ((f"{source}, row {number}", row) for number, row in enumerate(found[split], start=1))
        for name, split in zip(("train", "test"), splits, strict=True)
        if split in found
    }


def rows_of_json(source: str) -> Iterable[tuple[str, Any]]:
    """An array of objects, or one object a line."""
    text = text_of(source)
    if not (source.endswith(".json") and text.lstrip().startswith("[")):
        return json_rows(text, source)
    return [(f"{source}, item {i}", row) for i, row in enumerate(parsed(text, source), start=1)]


def rows_of_csv(source: str) -> Iterator[tuple[str, dict]]:
    """Cells are text; those of lists and numbers are JSON. An empty cell is not there."""
    csv.field_size_limit(1 << 30)
    delimiter = "\t" if source.endswith(".tsv") else ","
    text = io.StringIO(text_of(source), newline="")
    reader = csv.DictReader(text, strict=True, delimiter=delimiter)
    try:
        for row in reader:
            where = f"{source}, line {reader.line_num}"
            if None in row or None in row.values():
                more = "more" if None in row else "fewer"
                raise UserError(f"{where}: it has {more} cells than the first line")
            cells: dict[str, Any] = {name: cell for name, cell in row.items() if cell != ""}
            for name, cell in cells.items():
                talk = name in ("prompt", "completion") and cell.lstrip().startswith('[{"')
                if talk or name in (*LISTS, "weight"):
                    cells[name] = parsed(cell, f"{where}, {name}")
            yield where, cells
    except csv.Error as error:
        raise UserError(f"{source}, line {reader.reader.line_num}: not CSV ({error})") from None


# ----------------------------------------------------------------------------------- one row


def is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def is_text(value: Any) -> bool:
    halves = r"[\ud800-\udfff]"  # of surrogate pairs, which UTF-8 cannot spell
    return isinstance(value, str) and bool(value.strip()) and not re.search(halves, value)


def is_turn(value: Any) -> bool:
    turn = isinstance(value, Mapping) and isinstance(value.get("role"), str)
    return turn and (value.get("content") == "" or is_text(value.get("content")))


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < math.inf


TEXT = (0, is_text, "text that is not blank")
TURNS = (1, is_turn, '{"role": ..., "content": ...}, both strings')
TAKES: dict[str, tuple[int, Callable[[Any], bool], str]] = {
    "task": (0, lambda v: is_text(v) and v.isprintable(), "a name on one line"),
    "options": (1, is_text, "text that is not blank"),
    "weight": (0, lambda v: is_number(v) and v >= 0, "a number from 0 up"),
    "token_weight": (1, lambda v: is_number(v) and v >= 0, "a number from 0 up"),
    "input_ids": (1, lambda v: type(v) is int and v >= 0, "whole numbers from 0 up"),
    "labels": (1, lambda v: type(v) is int and (v >= 0 or v == -100),
               "tokens, or -100 where there is no label"),
    "teacher_ids": (2, lambda v: type(v) is int and v >= -1,
                    "whole numbers from 0 up, or -1 for none"),
    "teacher_log_prob": (2, lambda v: type(v) in (int, float) and v <= 0.01, "numbers up to 0"),
}  # fmt: skip
"""Of a column: how deep in lists its values are, whether one will do, and what will."""


def check(name: str, value: Any, depth: int, good: Callable[[Any], bool], takes: str) -> None:
    if is_list(value) if depth else good(value):
        for part in value if depth else ():
            check(name, part, depth - 1, good, takes)
    else:
        came, lists = reprlib.repr(value), "a list of " * depth
        raise ValueError(f'"{name}" has {came}, where it takes {lists}{takes}')


def checked(raw: Any, task: str, text_field: str, chat: bool) -> dict[str, Any]:
    """The row as TRL takes it, with our columns; every fault is a ValueError.

    Alpaca's columns become a conversation where the tokenizer has a chat template (`chat`), else
    the text that Alpaca was trained on.
    """
    if not isinstance(raw, Mapping):
        raise ValueError(f"an object is needed, not {reprlib.repr(raw)}")
    row = {name: value for name, value in raw.items() if value is not None}
    result = shaped(row, text_field, chat)
    own: dict[str, Any] = {"task": task}
    own |= {name: row[name] for name in ("task", "options", "weight", *PER_TOKEN) if name in row}
    for name, value in (result | own).items():
        many = name == "messages" or is_list(value)
        check(name, value, *TAKES.get(name, TURNS if many else TEXT))
        if value == []:
            raise ValueError(f'"{name}" is empty')
    options, answer = own.setdefault("options", None), own.setdefault("answer", answer_of(result))
    if options is not None:
        if answer is None or len(options) < 2:
            raise ValueError('"options" are two or more, and go with a completion or last message')
        if answer.strip() not in [option.strip() for option in options]:
            raise ValueError('the answer is none of the "options"')
    if len(result.get("labels", ())) != len(result.get("input_ids", ())):
        numbers = f'{len(result["input_ids"])} "input_ids" and {len(result["labels"])} "labels"'
        raise ValueError(f"there are {numbers}")
    there, absent = set(STORED) & set(own), set(STORED) - set(own)
    if there and absent:
        raise ValueError(f'there is "{there.pop()}" and no "{absent.pop()}"')
    if "weight" in own:
        own["sample_weights"] = own.pop("weight")
    if "group" in row:
        own["group"] = str(row["group"])
    if "tools" in row:
        own["tools"] = row["tools"] if isinstance(row["tools"], str) else json.dumps(row["tools"])
    if "chat_template_kwargs" in row:
        own["chat_template_kwargs"] = row["chat_template_kwargs"]
    return result | own


def shaped(row: dict, text_field: str, chat: bool) -> dict[str, Any]:
    """The columns that TRL reads."""
    pair = ("prompt", "completion")
    if "messages" in row:
        return {"messages": turns(row["messages"])}
    if "conversations" in row:
        return {"messages": turns(row["conversations"], row.get("system"))}
    if {"instruction", "output"} <= set(row) and not set(pair) <= set(row):
        row = alpaca(row, chat)
    if set(pair) <= set(row):
        if isinstance(row["prompt"], str) != isinstance(row["completion"], str):
            raise ValueError('"prompt" and "completion" must both be strings or both be messages')
        return {name: turns(row[name]) for name in pair}
    if "input_ids" in row:
        return {"input_ids": row["input_ids"], "labels": row.get("labels", row["input_ids"])}
    if text_field in row:
        return {text_field: row[text_field]}
    there = ", ".join(map(repr, row)) or "nothing"
    raise ValueError(f"there is {there}; a row has {SHAPES} or {text_field}")


def turns(value: Any, system: str | None = None) -> Any:
    """Messages under TRL's names, without what they lack; anything else as it is."""
    if not is_list(value):
        return value
    found = [] if system is None else [{"role": "system", "content": system}]
    for turn in value:
        if isinstance(turn, Mapping):
            if "from" in turn:  # ShareGPT's
                role = str(turn["from"])
                turn = {"role": ROLES.get(role, role), "content": turn.get("value")}
            empty = {"content": ""} if turn.get("tool_calls") else {}
            turn = empty | {key: part for key, part in turn.items() if part is not None}
        found.append(turn)
    return found


def alpaca(row: dict, chat: bool) -> dict[str, Any]:
    """Prompt and completion."""
    asked, given, answer = row["instruction"], row.get("input") or "", row["output"]
    for name in ("instruction", "output", *(["input"] if given else [])):
        check(name, row[name], *TEXT)
    if chat:
        asked = f"{asked}\n{given}" if given else asked
        prompt = turns([{"role": "user", "content": asked}], row.get("system") or None)
        return {"prompt": prompt, "completion": [{"role": "assistant", "content": answer}]}
    paired = ", paired with an input that provides further context" if given else ""
    given = f"### Input:\n{given}\n\n" if given else ""
    prompt = ALPACA.format(instruction=asked, paired=paired, input=given)
    return {"prompt": prompt, "completion": answer}


def answer_of(row: dict) -> str | None:
    """What a row trains a model to end with: a completion, or the assistant's last message."""
    last: Any = row.get("completion", row.get("messages"))
    if not is_list(last):
        return last
    return last[-1]["content"] if "completion" in row or last[-1]["role"] == "assistant" else None


# ------------------------------------------------------------------------------ all of the data


def load(settings: Settings, chat: bool, to_train: bool = True) -> Data:
    """Read, check, drop repeated rows and split. Raises `UserError` naming file and line."""
    given, theirs = settings.options, settings.mixture.datasets or settings.script.dataset_name
    if given.data and theirs:
        raise UserError("--data and dataset_name or datasets are given; it takes one of them")
    if not given.data and not theirs:
        raise UserError("there is nothing to train on: give --data or --dataset_name")
    parts: dict[str, list[dict]] = {"train": [], "test": []}
    for source, found, task in sources(settings):
        if "stream" in found:
            return Data([], found["stream"], [], [], {}, {}, {})
        for name, pairs in found.items():
            parts[name] += rows_of(source, pairs, task, settings, chat)
    shapes = list(dict.fromkeys(shape_of(row) for row in parts["train"] + parts["test"]))
    if len(shapes) > 1:
        raise UserError(f"some rows have {shapes[0]}, some {shapes[1]}; a run takes one of them")
    tasks = list(dict.fromkeys(row["task"] for row in parts["train"]))
    if not tasks:
        raise UserError("the data hold no rows")
    pieces: dict[str, list[dict]] = {"train": [], "held_out": [], "validation": []}
    counts = {}
    for task in tasks:
        rows, held = ([row for row in part if row["task"] == task] for part in parts.values())
        distinct, test = ({content_of(row): row for row in some} for some in (rows, held))
        found = split(task, distinct, test, settings, to_train)
        for name, some in found.items():
            pieces[name] += [row | {"task_ids": tasks.index(task)} for row in some]
        counts[task] = count = {"rows": len(rows), "repeated": len(rows) - len(distinct)}
        count |= {name: len(some) for name, some in found.items()}
        repeated = f", {count['repeated']} of them repeated" if count["repeated"] else ""
        watched = f", {count['validation']} for validation" if count["validation"] else ""
        say(
            f"{task}: {len(rows)} rows{repeated}; {count['train']} to train on, "
            f"{count['held_out']} held out{watched}"
        )
    train = pieces["train"]
    for name in ("sample_weights", *PER_TOKEN):
        known, column = sum(name in row for row in train), name.replace("sample_weights", "weight")
        if 0 < known < len(train):
            raise UserError(f"{known} of {len(train)} rows have a {column}; all or none must")
    weighs = [row.get("sample_weights", 1) and any(row.get("token_weight", [1])) for row in train]
    if train and not any(weighs):
        raise UserError("every row to train on weighs 0; at least one needs a weight above 0")
    answers = {task: [row["answer"] for row in train if row["task"] == task] for task in tasks}
    data = datasets.Dataset.from_list(train)
    if given.equal_tasks and len(tasks) > 1:
        of_task = [data.filter(lambda ids, i=i: ids == i, input_columns="task_ids")
                   for i in range(len(tasks))]  # fmt: skip
        data = datasets.interleave_datasets(of_task, stopping_strategy="all_exhausted")
    majority = {t: mode(a) for t, a in answers.items() if a and None not in a}
    few = {t: sorted(set(a)) for t, a in answers.items() if closed(a)}
    return Data(tasks, data, pieces["held_out"], pieces["validation"], counts, majority, few)


def shape_of(row: dict) -> str:
    if isinstance(row.get("prompt"), list):
        return "messages as prompt and completion"
    return next((name for name in ("messages", "prompt", "input_ids") if name in row), "text")


def closed(answers: Sequence[str | None]) -> bool:
    """Whether the answers are a few that repeat, as labels are."""
    return None not in answers and 1 < len(set(answers)) <= min(64, len(answers) / 4)


def rows_of(source: str, pairs: Iterable, task: str, settings: Settings, chat: bool) -> list[dict]:
    """Checked rows; columns that nothing reads are named."""
    text_field = settings.training.dataset_text_field
    rows, unread = [], dict[str, str]()
    for where, raw in pairs:
        try:
            rows.append({**checked(raw, task, text_field, chat), "where": where})
        except ValueError as error:
            raise UserError(f"{where}: {first_line(error)}") from None
        unread |= {name: "" for name in raw if name not in KNOWN and name != text_field}
    for name in unread:
        near = difflib.get_close_matches(str(name), KNOWN, n=1, cutoff=0.75)
        unread[name] = f"{name} (did you mean {near[0]}?)" if near else str(name)
    if unread:
        say(f"{source}: columns that nothing reads: {', '.join(unread.values())}")
    return rows


# ---------------------------------------------------------------------------------- splitting


def split(
    task: str, rows: dict[str, dict], test: dict[str, dict], settings: Settings, to_train: bool
) -> dict[str, list[dict]]:
    """A task's rows to train on, the held-out and the validation ones; of both keyed by content."""
    options, training = settings.options, settings.training
    seed = training.seed if options.split_seed is None else options.split_seed
    rng = random.Random(f"{seed} split {task}")
    groups = grouped([row for key, row in rows.items() if key not in test])
    wanted, number = options.eval_items, options.validation_items
    if test:
        held_out = list(test.values())
        rng.shuffle(held_out)
        held_out = held_out[:wanted]
        wanted = len(held_out)
    else:
        if wanted is None:
            wanted = min(100, len(rows) // 10) if options.data else 0
        held_out = take(groups, wanted, rng)
    if number is None:
        watched = options.task_weights == "coba" or (training.eval_strategy != "no" and not test)
        number = watched * min(32, max(1, len(rows) // 10))
    validation = take(groups, number, rng)
    train = [row for group in groups for row in group]
    if to_train and (len(held_out) < wanted or len(validation) < number or not train):
        raise UserError(
            f"task {task!r} has {len(rows)} different rows; {wanted} held-out and {number} "
            "validation items leave none to train on (--eval_items, --validation_items)"
        )
    return {"train": train, "held_out": held_out, "validation": validation}


def content_of(row: dict) -> str:
    return json.dumps({name: row[name] for name in sorted(set(row) - {"where", "options"})})


def grouped(rows: list[dict]) -> list[list[dict]]:
    """Rows of one group, or of one prompt, together."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        prompt = row.get("prompt") or row.get("messages", [row])[:-1] or row
        key = row.get("group") or json.dumps(prompt, default=str)
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def take(groups: list[list[dict]], count: int, rng: random.Random) -> list[dict]:
    """`count` rows of random groups, which are removed; every answer has its share among them.

    A group that would overfill them gives only as many rows as fit, and its others to nobody.
    """
    if count <= 0 or not groups:
        return []
    order = sorted(rng.sample(groups, len(groups)), key=lambda group: group[0]["answer"] or "")
    size = sum(map(len, groups)) / len(groups)
    number = min(len(groups), max(1, round(count / size)))
    first = {int((i + 0.5) * len(groups) / number) for i in range(number)}
    order = [order[i] for i in sorted(first)] + [g for i, g in enumerate(order) if i not in first]
    taken: list[dict] = []
    while order and len(taken) < count:
        taken += order.pop(0)
    left = set(map(id, order))
    groups[:] = [group for group in groups if id(group) in left]
    return taken[:count]


# ---------------------------------------------------------------------------------- tokenised


def fitted(trainer: Any, settings: Settings, given: dict[str, Any]) -> dict[str, Any]:
    """The parts of the data as the trainer has tokenised them; columns per token are cut as these.

    `given` is what they were: rows that were cut or left out are counted.
    """
    training, parts = settings.training, {"train": trainer.train_dataset}
    parts |= trainer.eval_dataset or {}
    longest, limit = 0, training.max_length
    options = {
        "limit": limit, "at_end": training.truncation_mode == "keep_end",
        "number": trainer.model.get_input_embeddings().num_embeddings,
        "taught": trainer.loss.reads_teacher,
    }  # fmt: skip
    for name in given:
        if not hasattr(parts[name], "__len__"):  # a stream
            continue
        parts[name] = rows = parts[name].map(fit, fn_kwargs=options)
        lengths = [len(ids) for ids in rows["input_ids"]]
        longest = max([longest, *lengths])
        cut, left_out = sum(n == limit for n in lengths), len(given[name]) - len(lengths)
        if training.packing and name == "train":
            continue
        if left_out:
            say(f"{name}: {left_out} rows are left out: no answer fits into --max_length {limit}")
        if cut:
            say(f"{name}: {cut} of {len(lengths)} rows reach --max_length {limit} and may be cut")
    check_positions(trainer, settings, longest)
    return parts


def fit(row: dict, limit: int | None, at_end: bool, number: int, taught: bool) -> dict | None:
    """What a tokenised row is to have in the place of its columns per token."""
    length, wrong = len(row["input_ids"]), None
    for name in {"input_ids", "labels"} & set(row):
        most = max(row[name], default=0)
        if most >= number:
            wrong = f"{name} has the token {most}; the model has {number}, from 0 up"
    found = {name: row[name] for name in PER_TOKEN if name in row}
    for name, values in found.items():
        if values is None or len(values) == length:
            continue
        if length != limit or len(values) < length:
            wrong = wrong or f"it has {len(values)} {name} for {length} tokens"
        found[name] = values[-length:] if at_end else values[:length]
    if taught and not wrong and found.get(STORED[0]) is not None:
        columns = [values[1:] for values in (row["labels"], *(found[name] for name in STORED))]
        wrong = next(filter(None, map(fault_of_teacher, *columns, [number] * length)), None)
    if wrong:
        raise UserError(f"{row.get('where', 'a row')}: {wrong}")
    return found or None


def fault_of_teacher(label: int, classes: list[int], logs: list[float], number: int) -> str | None:
    """What is wrong with what a stored teacher says of a token."""
    known = [i for i in classes if i >= 0]
    if len(classes) != len(logs):
        return f"teacher_ids and teacher_log_prob of a token have {len(classes)} and {len(logs)}"
    if len(set(known)) < len(known):
        return "teacher_ids must list distinct classes for each token"
    if max(known, default=0) >= number:
        return f"teacher_ids has {max(known)}; the model has {number} classes"
    total = sum(math.exp(x) for i, x in zip(classes, logs, strict=True) if i >= 0)
    if known and not 0 < total <= 1.01:
        return f"teacher_log_prob holds probabilities that add up to {total:.4g} for a token"
    return None if known or label == -100 else "teacher_ids has no class for some label"


def check_positions(trainer: Any, settings: Settings, longest: int) -> None:
    most = getattr(trainer.model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and longest + SLACK_TOKENS > most:
        raise UserError(
            f"{settings.model.model_name_or_path} reads at most {most} tokens, and the longest row "
            f"with an answer needs {longest + SLACK_TOKENS}; lower --max_length"
        )

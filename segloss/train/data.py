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
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import Settings
from .errors import UserError, first_line
from .model import quiet

STORED = ("teacher_ids", "teacher_log_prob")
PER_TOKEN = ("token_weight", *STORED)
OWN = ("task", "options", "group", "weight", *PER_TOKEN)
SHAPES = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt and completion": ("prompt", "completion"),
    "instruction and output": ("instruction", "output"),
    "input_ids": ("input_ids",),
}
BESIDE = ("input", "labels", "attention_mask", "system", "tools", "chat_template_kwargs")
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)


@dataclass(frozen=True)
class Data:
    """What a run trains on and is evaluated on."""

    tasks: list[str]
    """In the order that `task_ids` mean."""
    train: Any
    """A `datasets.Dataset`, or a stream that nothing was checked or held out of."""
    held_out: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    counts: dict[str, dict[str, int]]
    majority: dict[str, str]
    """The most frequent answer of each task's training rows."""
    answers: dict[str, list[str]]
    """Of a task whose answers are few and repeat: all of them."""

    @property
    def columns(self) -> list[str]:
        """Those that the loss reads beside the tokens."""
        names = self.train.column_names or []
        return [name for name in ("sample_weights", *PER_TOKEN) if name in names]


def say(text: str) -> None:
    """Progress goes to stderr, of the first process only; stdout holds the results."""
    from accelerate import PartialState

    if not PartialState._shared_state or PartialState().is_main_process:
        print(text, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------ reading


def read(source: str, config: str | None = None, split: str = "train", test: str = "test"):
    """({split: pairs of (where, raw row)}, the task it is of by its name)."""
    path = Path(source)
    lines = {".jsonl": json_lines, ".ndjson": json_lines, ".json": json_file}
    lines |= {".csv": csv_rows, ".tsv": csv_rows}
    if path.suffix in lines:
        return {split: lines[path.suffix](source)}, path.stem
    import datasets

    try:
        with quiet():
            if path.suffix == ".parquet":
                found: Any = datasets.load_dataset("parquet", data_files=source)
            elif any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
                found = datasets.load_from_disk(source)
            else:
                found = datasets.load_dataset(source, name=config)
    except Exception as error:  # foreign data fail in many ways
        raise UserError(
            f"cannot read {source}: {type(error).__name__}: {first_line(error)} (it takes .jsonl, "
            ".json, .csv, .tsv and .parquet files, folders of data sets and hub ids)"
        ) from None
    if isinstance(found, datasets.Dataset):
        found = {split: found}
    if split not in found:
        raise UserError(f"{source} has the splits {', '.join(found)}, none called {split}")
    return {n: numbered(source, found[n]) for n in (split, test) if n in found}, path.stem


def numbered(source: str, rows: Iterable[dict]) -> Iterator[tuple[str, dict]]:
    return ((f"{source}, row {number}", row) for number, row in enumerate(rows, start=1))


def content(source: str) -> bytes:
    try:
        return Path(source).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror}") from None


def json_lines(source: str) -> Iterator[tuple[str, dict]]:
    for number, line in enumerate(content(source).split(b"\n"), start=1):
        if line.strip():
            yield f"{source}, line {number}", parsed(line, f"{source}, line {number}")


def json_file(source: str) -> Iterator[tuple[str, dict]]:
    """An array of objects, or one object a line."""
    text = content(source)
    if not text.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from json_lines(source)
        return
    for number, row in enumerate(parsed(text, source), start=1):
        yield f"{source}, item {number}", row


def parsed(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 ({error.reason} at byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} " * ("line" not in where) + f"column {error.colno}"
        raise UserError(f"{where}: not JSON ({error.msg} at {place})") from None
    except RecursionError:
        raise UserError(f"{where}: not JSON that can be read (nested too deeply)") from None


def csv_rows(source: str) -> Iterator[tuple[str, dict]]:
    """Cells are text; those of lists and numbers are JSON. An empty cell is not there."""
    try:
        text = content(source).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content(source)[: error.start].count(b"\n") + 1
        raise UserError(f"{source}, line {line}: not UTF-8 ({error.reason})") from None
    csv.field_size_limit(1 << 30)
    delimiter = "\t" if source.endswith(".tsv") else ","
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    try:
        for row in reader:
            where = f"{source}, line {reader.line_num}"
            if None in row or None in row.values():
                more = "more" if None in row else "fewer"
                raise UserError(f"{where}: it has {more} cells than the first line")
            cells = {name: cell for name, cell in row.items() if cell != ""}
            lists = ("messages", "conversations", "options", "input_ids", "labels", *PER_TOKEN)
            for name in {*lists, "weight"} & set(cells):
                cells[name] = parsed(cells[name].encode(), f"{where}, {name}")
            for name in {"prompt", "completion"} & set(cells):
                if cells[name].lstrip().startswith('[{"'):
                    cells[name] = parsed(cells[name].encode(), f"{where}, {name}")
            yield where, cells
    except csv.Error as error:
        raise UserError(f"{source}, line {reader.reader.line_num}: not CSV ({error})") from None


# ----------------------------------------------------------------------------------- one row


def checked(raw: Any, task: str, text_field: str, chat: bool) -> dict[str, Any]:
    """The row as TRL takes it, with our columns; every fault is a ValueError.

    Alpaca's columns become a conversation where the tokenizer has a chat template (`chat`), else
    the text that Alpaca was trained on.
    """
    if not isinstance(raw, Mapping):
        raise ValueError(f"an object is needed, not {kind_of(raw)}")
    row = {name: value for name, value in raw.items() if value is not None}
    shape = next((s for s, names in SHAPES.items() if set(names) <= set(row)), None)
    if shape is None and text_field in row:
        content = {text_field: text(row[text_field], text_field)}
        answer = None
    elif shape is None:
        raise ValueError(
            f"there is {', '.join(map(repr, row)) or 'nothing'}; a row has "
            f"{', '.join(SHAPES)} or {text_field}"
        )
    else:
        content, answer = SHAPED[shape](row, chat)
    result: dict[str, Any] = dict(content)
    for name in ("tools", "chat_template_kwargs"):
        if name in row:
            result[name] = json.dumps(row[name]) if name == "tools" else row[name]
    if isinstance(row.get("tools"), str):
        result["tools"] = row["tools"]
    result["task"] = text(row.get("task", task), "task")
    if not result["task"].isprintable():
        raise ValueError('"task" must be a name on one line')
    result["answer"] = answer
    result["options"] = options(row, answer)
    if "group" in row:
        result["group"] = str(row["group"])
    if "weight" in row:
        result["sample_weights"] = weight(row["weight"], '"weight"')
    if "token_weight" in row:
        if not isinstance(row["token_weight"], Sequence) or isinstance(row["token_weight"], str):
            raise ValueError('"token_weight" must be a list with a number per token')
        result["token_weight"] = [weight(w, '"token_weight"') for w in row["token_weight"]]
    return result | stored(row)


def stored(row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a stored teacher, a list for each token in both."""
    found = {name: row[name] for name in STORED if name in row}
    if not found:
        return {}
    for name in STORED:
        if name not in found:
            raise ValueError(f'there is "{next(iter(found))}" and no "{name}"')
        lists = found[name]
        if not isinstance(lists, Sequence) or any(
            not isinstance(part, Sequence) or isinstance(part, str) for part in lists
        ):
            raise ValueError(f'"{name}" must be a list with a list of numbers per token')
    ids, log_prob = found.values()
    if [len(part) for part in ids] != [len(part) for part in log_prob]:
        raise ValueError('"teacher_ids" and "teacher_log_prob" must have lists of the same lengths')
    if any(type(i) is not int or i < -1 for part in ids for i in part):
        raise ValueError('"teacher_ids" must hold whole numbers from 0 up, or -1 for none')
    if any(type(x) not in (int, float) or not x <= 0.01 for part in log_prob for x in part):
        raise ValueError('"teacher_log_prob" must hold log-probabilities, numbers up to 0')
    for classes, logs in zip(ids, log_prob, strict=True):
        listed = [i for i in classes if i >= 0]
        if len(set(listed)) < len(listed):
            raise ValueError('"teacher_ids" must list distinct classes for each token')
        total = sum(math.exp(x) for i, x in zip(classes, logs, strict=True) if i >= 0)
        if listed and not 0 < total <= 1.01:
            raise ValueError(
                f'"teacher_log_prob" holds probabilities that add up to {total:.4g} for a token'
            )
    return found


def _messages(row: dict, chat: bool):
    found = messages(row["messages"], "messages")
    last = found[-1]
    return {"messages": found}, last["content"] if last["role"] == "assistant" else None


def _conversations(row: dict, chat: bool):
    turns = row["conversations"]
    if not isinstance(turns, Sequence) or not all(isinstance(turn, Mapping) for turn in turns):
        raise ValueError('"conversations" must be a list of objects')
    found = [
        {"role": ROLES.get(turn["from"], turn["from"]), "content": turn.get("value")}
        if "from" in turn
        else turn
        for turn in turns
    ]
    if "system" in row:
        found.insert(0, {"role": "system", "content": row["system"]})
    return _messages({"messages": found}, chat)


def _pair(row: dict, chat: bool):
    if isinstance(row["prompt"], str) != isinstance(row["completion"], str):
        raise ValueError('"prompt" and "completion" must both be strings or both be messages')
    if isinstance(row["prompt"], str):
        pair = {name: text(row[name], name) for name in ("prompt", "completion")}
        return pair, pair["completion"]
    found = {name: messages(row[name], name) for name in ("prompt", "completion")}
    return found, found["completion"][-1]["content"]


def _alpaca(row: dict, chat: bool):
    asked, answer = text(row["instruction"], "instruction"), text(row["output"], "output")
    given = text(row["input"], "input") if row.get("input") else ""
    if not chat:
        paired = ", paired with an input that provides further context" if given else ""
        given = f"### Input:\n{given}\n\n" if given else ""
        return {
            "prompt": ALPACA.format(instruction=asked, paired=paired, input=given),
            "completion": answer,
        }, answer
    prompt = [{"role": "user", "content": f"{asked}\n{given}" if given else asked}]
    if row.get("system"):
        prompt.insert(0, {"role": "system", "content": text(row["system"], "system")})
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": answer}]}, answer


def _tokens(row: dict, chat: bool):
    found = {name: row[name] for name in ("input_ids", "labels") if name in row}
    for name, ids in found.items():
        if not isinstance(ids, Sequence) or not all(type(i) is int for i in ids) or not ids:
            raise ValueError(f'"{name}" must be a list of whole numbers')
        wrong = next((i for i in ids if i < 0 and (i, name) != (-100, "labels")), None)
        if wrong is not None:
            raise ValueError(f'"{name}" has {wrong}; it takes tokens, and labels of none are -100')
    found.setdefault("labels", found["input_ids"])
    if len(found["labels"]) != len(found["input_ids"]):
        number = len(found["labels"])
        raise ValueError(f'there are {len(found["input_ids"])} "input_ids" and {number} "labels"')
    return found, None


SHAPED = {
    "messages": _messages,
    "conversations": _conversations,
    "prompt and completion": _pair,
    "instruction and output": _alpaca,
    "input_ids": _tokens,
}


def messages(value: Any, name: str) -> list[dict]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ValueError(f'"{name}" must be a list of messages, not {kind_of(value)}')
    found = []
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f'each of "{name}" must be an object with "role" and "content"')
        message = {key: part for key, part in message.items() if part is not None}
        if message.get("tool_calls"):
            message.setdefault("content", "")
        if not isinstance(message.get("content"), str):
            kind = kind_of(message.get("content"))
            raise ValueError(f'the "content" of a message must be a string, not {kind}')
        text(message["content"] or "-", "content")
        found.append(message)
    return found


def text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f'"{name}" must be a string, not {kind_of(value)}')
    if not value.strip():
        raise ValueError(f'"{name}" is empty')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f'"{name}" holds half of a surrogate pair') from None
    return value


def options(row: dict, answer: str | None) -> list[str] | None:
    found = row.get("options")
    if found is None:
        return None
    if not isinstance(found, Sequence) or isinstance(found, str) or len(found) < 2:
        raise ValueError('"options" must be a list of at least two strings')
    found = [text(option, "an option") for option in found]
    if answer is None:
        raise ValueError('"options" go with an answer: a completion, or messages that end in one')
    if answer.strip() not in [option.strip() for option in found]:
        raise ValueError('the answer is none of the "options"')
    return found


def weight(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a number from 0 up, not {value!r}")
    return float(value)


def kind_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return names.get(type(value), "null" if value is None else "a number")


# ------------------------------------------------------------------------------ all of the data


def load(settings: Settings, chat: bool, to_train: bool = True) -> Data:
    """Read, check, drop repeated rows and split. Raises `UserError` naming file and line."""
    import datasets

    options, script = settings.options, settings.script
    parts: dict[str, list[dict]] = {"train": [], "test": []}
    if settings.mixture.datasets or script.dataset_name:
        if options.data:
            raise UserError("--data and dataset_name or datasets are given; it takes one of them")
        parts = hub_rows(settings, chat)
        if "stream" in parts:
            return Data([], parts["stream"], [], [], {}, {}, {})
    elif not options.data:
        raise UserError("there is nothing to train on: give --data or --dataset_name")
    for source in options.data or ():
        found, task = read(source)
        parts["train"] += rows_of(source, found["train"], task, settings, chat)
        parts["test"] += rows_of(source, found.get("test", ()), task, settings, chat)
    shapes = list(dict.fromkeys(shape_of(row) for row in parts["train"] + parts["test"]))
    if len(shapes) > 1:
        raise UserError(f"some rows have {shapes[0]}, some {shapes[1]}; a run takes one of them")
    tasks = list(dict.fromkeys(row["task"] for row in parts["train"]))
    if not tasks:
        raise UserError("the data hold no rows")
    split = Split(settings, parts["test"], to_train)
    pieces = [split(task, [row for row in parts["train"] if row["task"] == task]) for task in tasks]
    train, held_out, validation = ([row for piece in pieces for row in piece[i]] for i in range(3))
    for row in train + held_out + validation:
        row["task_ids"] = tasks.index(row["task"])
    for name in ("sample_weights", *PER_TOKEN):
        known = sum(name in row for row in train)
        if 0 < known < len(train):
            column = "weight" if name == "sample_weights" else name
            raise UserError(f"{known} of {len(train)} rows have a {column}; all or none must")
    answers = {task: [row["answer"] for row in train if row["task"] == task] for task in tasks}
    data = datasets.Dataset.from_list(train)
    if options.equal_tasks and len(tasks) > 1:
        of_task = [data.filter(lambda ids, i=i: ids == i, input_columns="task_ids")
                   for i in range(len(tasks))]  # fmt: skip
        data = datasets.interleave_datasets(of_task, stopping_strategy="all_exhausted")
    return Data(
        *(tasks, data, held_out, validation, split.counts),
        majority={
            t: Counter(a).most_common(1)[0][0] for t, a in answers.items() if a and None not in a
        },
        answers={t: sorted(set(a)) for t, a in answers.items() if closed(a)},
    )


def shape_of(row: dict) -> str:
    if isinstance(row.get("prompt"), list):
        return "messages as prompt and completion"
    return next((name for name in ("messages", "prompt", "input_ids") if name in row), "text")


def closed(answers: Sequence[str | None]) -> bool:
    """Whether the answers are a few that repeat, as labels are."""
    return None not in answers and 1 < len(set(answers)) <= min(64, len(answers) / 4)


def hub_rows(settings: Settings, chat: bool) -> dict[str, Any]:
    """The splits of `datasets` or `dataset_name`, as `trl sft` reads them."""
    import trl

    script, mixture = settings.script, settings.mixture
    train, test = script.dataset_train_split, script.dataset_test_split
    if not mixture.datasets and not script.dataset_streaming:
        found, task = read(script.dataset_name, script.dataset_config, train, test)
    else:
        try:
            if mixture.datasets:
                loaded, task = trl.get_dataset(mixture), "data"
            else:
                import datasets

                loaded = datasets.load_dataset(
                    script.dataset_name, name=script.dataset_config, streaming=True
                )
                task = script.dataset_name.rpartition("/")[2]
        except Exception as error:
            raise UserError(f"cannot read the data: {first_line(error)}") from None
        if mixture.streaming or script.dataset_streaming:
            return {"stream": loaded[train]}
        found = {n: numbered(f"split {n}", loaded[n]) for n in (train, test) if n in loaded}
    source = script.dataset_name or "datasets"
    return {
        "train": rows_of(source, found[train], task, settings, chat),
        "test": rows_of(source, found.get(test, ()), task, settings, chat),
    }


def rows_of(source: str, pairs: Iterable, task: str, settings: Settings, chat: bool) -> list[dict]:
    """Checked rows; columns that nothing reads are named."""
    text_field = settings.training.dataset_text_field
    known = {*OWN, *BESIDE, *(n for names in SHAPES.values() for n in names), text_field}
    rows, unread = [], Counter[str]()
    for where, raw in pairs:
        try:
            rows.append({**checked(raw, task, text_field, chat), "where": where})
        except ValueError as error:
            raise UserError(f"{where}: {first_line(error)}") from None
        unread.update(str(name) for name in raw if name not in known)
    if unread:
        names = []
        for name in unread:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
            names.append(f"{name} (did you mean {near[0]}?)" if near else name)
        say(f"{source}: columns that nothing reads: {', '.join(names)}")
    return rows


# ---------------------------------------------------------------------------------- splitting


@dataclass
class Split:
    """Splits a task's rows into those to train on, the held-out and the validation ones."""

    settings: Settings
    test: list[dict]
    to_train: bool

    def __post_init__(self) -> None:
        self.counts: dict[str, dict[str, int]] = {}

    def __call__(self, task: str, rows: list[dict]) -> tuple[list[dict], list[dict], list[dict]]:
        options = self.settings.options
        distinct = {content_of(row): row for row in rows}
        test = {content_of(row): row for row in self.test if row["task"] == task}
        seed = options.split_seed
        seed = self.settings.training.seed if seed is None else seed
        rng = random.Random(f"{seed} split {task}")
        evaluates = self.settings.training.eval_strategy != "no" and not test
        number = options.validation_items
        if number is None:
            watched = options.task_weights == "coba" or evaluates
            number = watched * min(32, max(1, len(distinct) // 10))
        if test:
            held_out = list(test.values())
            rng.shuffle(held_out)
            held_out = held_out[: options.eval_items]
            groups = grouped([row for key, row in distinct.items() if key not in test])
        else:
            groups = grouped(list(distinct.values()))
            wanted = options.eval_items
            if wanted is None:
                wanted = min(100, len(distinct) // 10) if options.data else 0
            held_out = take(groups, wanted, rng)
        validation = take(groups, number, rng)
        train = [row for group in groups for row in group]
        self.counts[task] = count = {
            "rows": len(rows), "repeated": len(rows) - len(distinct), "train": len(train),
            "held_out": len(held_out), "validation": len(validation),
        }  # fmt: skip
        wanted = len(held_out) if test else wanted
        if self.to_train and (len(held_out) < wanted or len(validation) < number or not train):
            raise UserError(
                f"task {task!r} has {len(distinct)} different rows; {wanted} held-out and {number} "
                "validation items leave none to train on (--eval_items, --validation_items)"
            )
        repeated = f", {count['repeated']} of them repeated" if count["repeated"] else ""
        watched = f", {len(validation)} for validation" if validation else ""
        say(
            f"{task}: {len(rows)} rows{repeated}; {len(train)} to train on, {len(held_out)} held "
            f"out{watched}"
        )
        return train, held_out, validation


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
    used: set[int] = set()
    for group in order:
        if len(taken) >= count:
            break
        taken += group
        used.add(id(group))
    groups[:] = [group for group in groups if id(group) not in used]
    return taken[:count]

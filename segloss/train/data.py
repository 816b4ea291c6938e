"""Data of `segloss train`: files, saved data sets and hub ids as checked rows, split by task.

A row has one of TRL's shapes (`shaped`), which is left to TRL to tokenise, and columns of our own
(`OURS`); docs/training.md says what they mean.
"""

from __future__ import annotations

import csv
import io
import json
import math
import random
import re
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mode
from typing import Any

import datasets
import torch
import trl
from accelerate import PartialState

from segloss import TopK
from segloss.integrations.columns import lists
from segloss.integrations.window import IGNORE, check_stored

from .config import Settings
from .errors import UserError, first_line, json_rows, nearest, parsed, text_of

STORED = ("teacher_ids", "teacher_log_prob")
PER_TOKEN = ("token_weight", *STORED)
OURS = ("task", "options", "weight", *PER_TOKEN)
SHAPES = "messages, conversations, prompt and completion, instruction and output, input_ids"
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


def sources(settings: Settings) -> list[str]:
    """The names of what is read."""
    options, mixture, name = settings.options, settings.mixture, settings.script.dataset_name
    theirs = ["datasets"] if mixture.datasets else [name] if name else []
    if options.data and theirs:
        raise UserError("--data and dataset_name or datasets are given; it takes one of them")
    found = options.data or theirs
    if not found:
        raise UserError("there is nothing to train on: give --data or --dataset_name")
    return found


def read(source: str, settings: Settings) -> dict[str, Any]:
    """Pairs of (where, raw row) of the parts "train" and "test", or a stream to train on."""
    path, script = Path(source), settings.script
    if path.suffix in (".jsonl", ".ndjson", ".json"):
        return {"train": json_rows(text_of(source), source)}
    if path.suffix in (".csv", ".tsv"):
        return {"train": rows_of_csv(source)}
    try:
        if settings.mixture.datasets:
            found: Any = trl.get_dataset(settings.mixture)
        elif path.suffix == ".parquet":
            found = datasets.load_dataset("parquet", data_files=source, split="train")
        elif any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(source)
        else:
            options = {"name": script.dataset_config, "streaming": script.dataset_streaming}
            found = datasets.load_dataset(source, **options)
    except Exception as error:  # foreign data fail in many ways
        raise UserError(
            f"cannot read {source}: {type(error).__name__}: {first_line(error)} (it takes .jsonl, "
            ".json, .csv, .tsv and .parquet files, folders of data sets and hub ids)"
        ) from None
    train, test = script.dataset_train_split, script.dataset_test_split
    found = found if isinstance(found, dict) else {train: found}
    if train not in found:
        raise UserError(f"{source} has the splits {', '.join(found)}, none called {train}")
    if isinstance(found[train], datasets.IterableDataset):
        if settings.options.tasks or len(settings.options.data or ()) > 1:
            raise UserError(f"{source} is a stream; it is read alone and without --tasks")
        return {"stream": found[train]}
    return {
        name: ((f"{source}, row {number}", row) for number, row in enumerate(found[split], start=1))
        for name, split in (("train", train), ("test", test))
        if split in found
    }


def rows_of_csv(source: str) -> Iterator[tuple[str, dict]]:
    """Cells are text; those of lists and numbers are JSON. An empty cell is not there."""
    csv.field_size_limit(1 << 30)
    text, mark = io.StringIO(text_of(source), newline=""), "\t" if source.endswith(".tsv") else ","
    reader = csv.DictReader(text, strict=True, delimiter=mark)
    try:
        for row in reader:
            where = f"{source}, line {reader.line_num}"
            if None in row or None in row.values():
                more = "more" if None in row else "fewer"
                raise UserError(f"{where}: it has {more} cells than the first line")
            cells: dict[str, Any] = {name: cell for name, cell in row.items() if cell != ""}
            for name, cell in cells.items():
                talk = name in ("prompt", "completion") and cell.lstrip().startswith('[{"')
                if talk or name == "weight" or TAKES.get(name, TEXT)[0]:
                    cells[name] = parsed(cell, f"{where}, {name}")
            yield where, cells
    except csv.Error as error:
        raise UserError(f"{source}, line {reader.reader.line_num}: not CSV ({error})") from None


def is_text(value: Any) -> bool:
    halves = r"[\ud800-\udfff]"  # of surrogate pairs, which UTF-8 cannot spell
    return isinstance(value, str) and bool(value.strip()) and not re.search(halves, value)


def is_turn(value: Any) -> bool:
    turn = isinstance(value, dict) and isinstance(value.get("role"), str)
    return turn and (value.get("content") == "" or is_text(value.get("content")))


def is_weight(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


TEXT = (0, is_text, "text that is not blank")
TURNS = (1, is_turn, '{"role": ..., "content": ...}, both strings')
TAKES: dict[str, tuple[int, Callable[[Any], bool], str]] = {
    "messages": TURNS, "conversations": TURNS,
    "task": (0, lambda v: is_text(v) and v.isprintable(), "a name on one line"),
    "options": (1, is_text, "text that is not blank"),
    "weight": (0, is_weight, "a number from 0 up"),
    "token_weight": (1, is_weight, "a number from 0 up"),
    "input_ids": (1, lambda v: type(v) is int and v >= 0, "whole numbers from 0 up"),
    "labels": (1, lambda v: type(v) is int and (v >= 0 or v == -100), "tokens, or -100 for none"),
    "teacher_ids": (2, lambda v: type(v) is int and v >= -1, "whole numbers, or -1 for none"),
    "teacher_log_prob": (2, lambda v: type(v) in (int, float) and v <= 0.01, "numbers up to 0"),
}  # fmt: skip
"""Of a column: how deep in lists its values are, whether one will do, and what will."""
KNOWN = {*TAKES, "prompt", "completion", "instruction", "input", "output", "system", "tools"}
KNOWN |= {"group", "attention_mask", "chat_template_kwargs"}


def check(name: str, value: Any, depth: int, good: Callable[[Any], bool], takes: str) -> None:
    if depth and isinstance(value, list):
        for part in value:
            check(name, part, depth - 1, good, takes)
    elif depth or not good(value):
        takes = "a list of " * depth + takes
        raise ValueError(f'"{name}" has {reprlib.repr(value)}, where it takes {takes}')


def checked(raw: Any, task: str, text_field: str, chat: bool) -> dict[str, Any]:
    """The row as TRL takes it, with our columns; every fault is a ValueError."""
    if not isinstance(raw, dict):
        raise ValueError(f"an object is needed, not {reprlib.repr(raw)}")
    row = {name: value for name, value in raw.items() if value is not None}
    found = shaped(row, text_field, chat) | {"task": task}
    found |= {name: row[name] for name in OURS if name in row}
    for name, value in found.items():
        check(name, value, *TAKES.get(name, TURNS if isinstance(value, list) else TEXT))
        if value == []:
            raise ValueError(f'"{name}" is empty')
    if len(found.get("labels", ())) != len(found.get("input_ids", ())):
        numbers = f'{len(found["input_ids"])} "input_ids" and {len(found["labels"])} "labels"'
        raise ValueError(f"there are {numbers}")
    ids, logs = ([*map(len, found.get(name, ()))] for name in STORED)
    if ids != logs:
        numbers = f'{sum(ids)} "teacher_ids" and {sum(logs)} "teacher_log_prob"'
        raise ValueError(f"there are {numbers}; a token has as many of both")
    options, answer = found.get("options"), answer_of(found)
    if options is not None:
        if answer is None or len(options) < 2:
            raise ValueError('"options" are two or more, and go with a completion or last message')
        if answer.strip() not in [option.strip() for option in options]:
            raise ValueError('the answer is none of the "options"')
    if "weight" in found:
        found["sample_weights"] = found.pop("weight")
    if "group" in row:
        found["group"] = str(row["group"])
    if "chat_template_kwargs" in row:
        found["chat_template_kwargs"] = row["chat_template_kwargs"]
    tools = row.get("tools")
    tools = tools if isinstance(tools, str | None) else json.dumps(tools)
    return found | {"options": options, "answer": answer, "tools": tools}


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
    if not isinstance(value, list):
        return value
    found = [] if system is None else [{"role": "system", "content": system}]
    for turn in value:
        if isinstance(turn, dict):
            if "from" in turn:  # ShareGPT's
                role = str(turn["from"])
                turn = {"role": ROLES.get(role, role), "content": turn.get("value")}
            empty = {"content": ""} if turn.get("tool_calls") else {}
            turn = empty | {key: part for key, part in turn.items() if part is not None}
        found.append(turn)
    return found


def alpaca(row: dict, chat: bool) -> dict[str, Any]:
    """A conversation where the tokenizer has a chat template, else the text that Alpaca knows."""
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
    if not isinstance(last, list):
        return last
    return last[-1]["content"] if "completion" in row or last[-1]["role"] == "assistant" else None


def load(settings: Settings, chat: bool, to_train: bool = True) -> Data:
    """Read, check, drop repeated rows and split. Raises `UserError` naming file and line."""
    parts: dict[str, list[dict]] = {"train": [], "test": []}
    for source in sources(settings):
        found = read(source, settings)
        if "stream" in found:
            return Data([], found["stream"], [], [], {}, {}, {})
        for part, pairs in found.items():
            parts[part] += rows_of(source, pairs, settings, chat)
    shapes = list(dict.fromkeys(shape_of(row) for rows in parts.values() for row in rows))
    if len(shapes) > 1:
        raise UserError(f"some rows have {shapes[0]}, some {shapes[1]}; a run takes one of them")
    tasks = tasks_of(parts["train"], settings.options.tasks)
    pieces: dict[str, list[dict]] = {"train": [], "held_out": [], "validation": []}
    counts, majority, few = {}, {}, {}
    for number, task in enumerate(tasks):
        rows, held = ([row for row in part if row["task"] == task] for part in parts.values())
        distinct, test = ({content_of(row): row for row in some} for some in (rows, held))
        found = split(task, distinct, test, settings, to_train)
        counts[task] = {"rows": len(rows), "repeated": len(rows) - len(distinct)}
        for name, some in found.items():
            counts[task][name] = len(some)
            pieces[name] += [row | {"task_ids": number} for row in some]
        told = (f"{count} {name.replace('_', ' ')}" for name, count in counts[task].items())
        say(f"{task}: {', '.join(told)}")
        answers = [row["answer"] for row in found["train"]]
        if answers and None not in answers:
            majority[task], labels = mode(answers), sorted(set(answers))
            if 1 < len(labels) <= min(64, len(answers) / 4):  # they are few and repeat
                few[task] = labels
    check_weights(pieces["train"])
    train = datasets.Dataset.from_list(pieces["train"])
    if settings.options.equal_tasks and len(tasks) > 1:
        of_task = [train.filter(lambda of, t=t: of == t, input_columns="task") for t in tasks]
        train = datasets.interleave_datasets(of_task, stopping_strategy="all_exhausted")
    return Data(tasks, train, pieces["held_out"], pieces["validation"], counts, majority, few)


def tasks_of(rows: list[dict], wanted: list[str] | None) -> list[str]:
    """Those of the rows, or those of them that are wanted, in the order of the rows."""
    there = list(dict.fromkeys(row["task"] for row in rows))
    if not there:
        raise UserError("the data hold no rows")
    for name in wanted or ():
        if name not in there:
            raise UserError(f"--tasks has {name!r}; the data have {' '.join(there)}")
    return [task for task in there if task in (wanted or there)]


def check_weights(rows: list[dict]) -> None:
    for name in ("sample_weights", *PER_TOKEN, "chat_template_kwargs"):
        known, column = sum(name in row for row in rows), name.replace("sample_weights", "weight")
        if 0 < known < len(rows):
            raise UserError(f"{known} of {len(rows)} rows have a {column}; all or none must")
    weighs = [row.get("sample_weights", 1) and any(row.get("token_weight", [1])) for row in rows]
    if rows and not any(weighs):
        raise UserError("every row to train on weighs 0; at least one needs a weight above 0")


def shape_of(row: dict) -> str:
    if isinstance(row.get("prompt"), list):
        return "messages as prompt and completion"
    return next((name for name in ("messages", "prompt", "input_ids") if name in row), "text")


def rows_of(source: str, pairs: Iterable, settings: Settings, chat: bool) -> list[dict]:
    """Checked rows, of the task that their source is named by; columns not read are named."""
    task, text_field = Path(source).stem, settings.training.dataset_text_field
    rows, names = [], dict[str, None]()
    for where, raw in pairs:
        try:
            rows.append(checked(raw, task, text_field, chat) | {"where": where})
        except ValueError as error:
            raise UserError(f"{where}: {first_line(error)}") from None
        names |= dict.fromkeys(raw)
    unread = [name for name in names if name not in (*KNOWN, text_field)]
    if unread:
        hints = [f"{name} ({near})" if (near := nearest(name, KNOWN)) else name for name in unread]
        say(f"{source}: columns that nothing reads: {', '.join(hints)}")
    return rows


def split(
    task: str, rows: dict[str, dict], test: dict[str, dict], settings: Settings, to_train: bool
) -> dict[str, list[dict]]:
    """A task's rows to train on, the held-out and the validation ones; of both keyed by content."""
    options, training = settings.options, settings.training
    seed = training.seed if options.split_seed is None else options.split_seed
    rng = random.Random(f"{seed} split {task}")
    groups = grouped(row for key, row in rows.items() if key not in test)
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
    train = [row for group in groups.values() for row in group]
    if to_train and (len(held_out) < wanted or len(validation) < number or not train):
        raise UserError(
            f"task {task!r} has {len(rows)} different rows; {wanted} held-out and {number} "
            "validation items leave none to train on (--eval_items, --validation_items)"
        )
    return {"train": train, "held_out": held_out, "validation": validation}


def content_of(row: dict) -> str:
    return json.dumps({name: row[name] for name in sorted(set(row) - {"where", "options"})})


def grouped(rows: Iterable[dict]) -> dict[str, list[dict]]:
    """Rows of one group, or of one prompt, together."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        prompt = row.get("prompt") or row.get("messages", [row])[:-1] or row
        groups.setdefault(row.get("group") or json.dumps(prompt), []).append(row)
    return groups


def take(groups: dict[str, list[dict]], count: int, rng: random.Random) -> list[dict]:
    """`count` rows of random groups, which are removed; every answer has its share among them.

    A group that would overfill them gives only as many rows as fit, and its others to nobody.
    """
    if count <= 0 or not groups:
        return []
    drawn = rng.sample(list(groups), len(groups))
    order = sorted(drawn, key=lambda name: groups[name][0]["answer"] or "")
    size = sum(map(len, groups.values())) / len(order)
    number = min(len(order), max(1, round(count / size)))
    spread = [order[int((i + 0.5) * len(order) / number)] for i in range(number)]
    taken: list[dict] = []
    for name in dict.fromkeys([*spread, *order]):
        if len(taken) < count:
            taken += groups.pop(name)
    return taken[:count]


def fitted(trainer: Any, settings: Settings, given: dict[str, Any]) -> dict[str, Any]:
    """The parts of the data as the trainer has tokenised them; columns per token are cut as these.

    `given` is what they were: rows that were cut or left out are counted.
    """
    training, parts = settings.training, {"train": trainer.train_dataset}
    parts |= trainer.eval_dataset or {}
    longest, limit, at_end = 0, training.max_length, training.truncation_mode == "keep_end"
    number = trainer.model.get_input_embeddings().num_embeddings
    options = {"number": number, "limit": limit, "at_end": at_end}
    options["taught"] = trainer.loss.reads_teacher
    for name in given:
        if not hasattr(parts[name], "__len__"):  # a stream
            continue
        parts[name] = parts[name].map(fit, fn_kwargs=options)
        lengths = [len(ids) for ids in parts[name]["input_ids"]]
        longest = max([longest, *lengths])
        cut, left_out = lengths.count(limit), len(given[name]) - len(lengths)
        if training.packing and name == "train":
            continue
        if not lengths:
            raise UserError(f"{name}: no row has a label that fits into --max_length {limit}")
        if left_out:
            say(f"{name}: {left_out} rows are left out: no answer fits into --max_length {limit}")
        if cut:
            say(f"{name}: {cut} of {len(lengths)} rows reach --max_length {limit} and may be cut")
    most = getattr(trainer.model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and longest + SLACK_TOKENS > most:
        raise UserError(
            f"{settings.model.model_name_or_path} reads at most {most} tokens, and the longest row "
            f"with an answer needs {longest + SLACK_TOKENS}; lower --max_length"
        )
    return parts


def fit(row: dict, limit: int | None, at_end: bool, number: int, taught: bool) -> dict | None:
    """What a tokenised row is to have in the place of its columns per token."""
    length = len(row["input_ids"])
    found = {name: row[name] for name in PER_TOKEN if row.get(name) is not None}
    tokens = {name: row[name] for name in ("input_ids", "labels") if name in row}
    try:
        for name, values in found.items():
            if len(values) != length and (len(values) < length or length != limit):
                raise ValueError(f"it has {len(values)} {name} for {length} tokens")
            found[name] = values[-length:] if at_end else values[:length]
        if taught and STORED[0] in found:
            # what stands at the first token is of no prediction
            ids, log_prob = (lists(name, [found])[0][1:] for name in STORED)
            check_stored(TopK(ids, log_prob), torch.tensor(row["labels"][1:]) != IGNORE)
            tokens[STORED[0]] = ids.flatten().tolist()
        for name, values in tokens.items():
            most = max(values, default=0)
            if most >= number:
                raise ValueError(f"{name} has the token {most}; the model has {number}, from 0 up")
    except ValueError as error:
        raise UserError(f"{row.get('where', 'a row')}: {error}") from None
    return found or None

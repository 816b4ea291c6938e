"""From JSON lines to batches: reading, splitting, ordering, encoding, padding.

An example is encoded as `prompt + completion + end of text`, tokenised separately so that the
boundary between them is the one generation starts from. Labels are the input ids, with IGNORE on
the prompt and on padding: the loss is on the completion and the end of text only.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from segloss.integrations.window import IGNORE

from .errors import UserError, first_line
from .tasks import Example

# --------------------------------------------------------------------------------- JSON lines


def read_jsonl(path: str) -> list[Example]:
    """The examples of one file; the error for a bad line names the file and the line."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    examples = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            examples.append(_example(line))
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {first_line(error)}") from None
    if not examples:
        raise UserError(f"{path} holds no examples")
    return examples


def _example(line: bytes) -> Example:
    """One JSON object; every fault is a ValueError."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("not JSON that can be read (nested too deeply)") from None
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object is needed, not {_json_type(row)}")
    task, prompt, completion = (_text(row, key) for key in ("task", "prompt", "completion"))
    if not task.isprintable():
        raise ValueError('"task" must be a name on one line')
    options = _options(row, completion)
    group = _text(row, "group") if "group" in row else ""
    return Example(task, prompt, completion, options, group)


def _text(row: dict, key: str) -> str:
    if key not in row:
        raise ValueError(f'"{key}" is missing; there is {", ".join(row) or "nothing"}')
    return _checked_text(row[key], f'"{key}"')


def _checked_text(value, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, not {_json_type(value)}")
    if not value.strip():
        raise ValueError(f"{name} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{name} holds half of a surrogate pair") from None
    return value


def _options(row: dict, completion: str) -> tuple[str, ...]:
    options = row.get("options")
    if options is None:
        return ()
    if not isinstance(options, list) or len(options) < 2:
        raise ValueError('"options" must be a list of at least two strings')
    options = tuple(_checked_text(option, "an option") for option in options)
    if completion.strip() not in [option.strip() for option in options]:
        raise ValueError('"completion" is none of the "options"')
    return options


def _json_type(value) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return names.get(type(value), "null" if value is None else "a number")


# ----------------------------------------------------------------------------------- encoding


@dataclass(frozen=True)
class Encoded:
    """An example and its token ids."""

    example: Example
    prompt_ids: list[int]
    completion_ids: list[int]
    """The completion and the end of text."""


def encode(examples: Sequence[Example], tokenizer) -> list[Encoded]:
    """Token ids; the prompt with the tokenizer's own beginning of text, if it has one."""
    prompts = tokenizer([example.prompt for example in examples])["input_ids"]
    completions = tokenizer([example.completion for example in examples], add_special_tokens=False)[
        "input_ids"
    ]
    return [
        Encoded(example, prompt, [*completion, tokenizer.eos_token_id])
        for example, prompt, completion in zip(examples, prompts, completions, strict=True)
    ]


def within_limits(encoded: Sequence[Encoded], prompt: int, completion: int) -> list[Encoded]:
    """The examples with at most so many tokens, and at least one in the prompt to predict from."""
    return [
        item
        for item in encoded
        if 1 <= len(item.prompt_ids) <= prompt and len(item.completion_ids) <= completion
    ]


# ------------------------------------------------------------------------- splitting and order


@dataclass(frozen=True)
class TaskData:
    """One task's examples, split."""

    task: str
    train: list[Encoded]
    held_out: list[Encoded]
    """What the results are reported on."""
    validation: list[Encoded] = field(default_factory=list)
    """What is read during training, by CoBa and early stopping; in neither of the others."""


def split(
    encoded: Sequence[Encoded],
    held_out: int,
    seed: int,
    validation: int = 0,
    to_train: bool = True,
) -> list[TaskData]:
    """Hold out `held_out` random items of each task, whole groups at a time, then `validation`.

    With `to_train` fewer of them, or none left to train on, are a `UserError`.

    The held-out items are the same whether there are validation items or not. Repeated (prompt,
    completion) pairs are kept once. A group that would overfill a part gives only as many items as
    fit; its other items are left out of every part.
    """
    tasks: dict[str, dict[tuple[str, str], Encoded]] = {}
    for item in encoded:
        example = item.example
        tasks.setdefault(example.task, {})[example.prompt, example.completion] = item
    return [
        _split_task(task, list(items.values()), held_out, seed, validation, to_train)
        for task, items in tasks.items()
    ]


def _split_task(
    task: str, items: list[Encoded], held_out: int, seed: int, validation: int, to_train: bool
) -> TaskData:
    groups: dict[str, list[Encoded]] = {}
    for item in items:
        groups.setdefault(item.example.group or item.example.prompt, []).append(item)
    order = list(groups.values())
    random.Random(f"{seed} split {task}").shuffle(order)
    reported, watched = _take(order, held_out), _take(order, validation)
    train = [item for group in order for item in group]
    enough = len(reported) == held_out and len(watched) == validation and train
    if to_train and not enough:
        more = f" and --validation-items {validation}" if validation else ""
        leave = "leave" if validation else "leaves"
        raise UserError(
            f"task {task!r} has {len(items)} usable examples; --eval-items {held_out}{more} "
            f"{leave} none to train on (prompts over --max-prompt-tokens are not usable)"
        )
    return TaskData(task, train, reported, watched)


def _take(groups: list[list[Encoded]], count: int) -> list[Encoded]:
    """Up to `count` items of the last groups, which are removed."""
    items: list[Encoded] = []
    while groups and len(items) < count:
        items += groups.pop()
    return items[:count]


def training_order(tasks: Sequence[TaskData], length: int, seed: int) -> list[Encoded]:
    """`length` examples, the tasks taking turns, each task in a new random order every round.

    So every batch holds every task in equal share, and a task with fewer examples repeats them.
    """
    streams = [_endless(task, seed) for task in tasks]
    return [next(streams[i % len(streams)]) for i in range(length)]


def _endless(task: TaskData, seed: int):
    rng = random.Random(f"{seed} order {task.task}")
    while True:
        yield from rng.sample(task.train, len(task.train))


# ------------------------------------------------------------------------------------- batches


def training_batch(items: Sequence[Encoded], pad_id: int) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels (B, T), padded on the right."""
    ids = [item.prompt_ids + item.completion_ids for item in items]
    labels = [[IGNORE] * len(item.prompt_ids) + item.completion_ids for item in items]
    return {
        "input_ids": _pad(ids, pad_id),
        "attention_mask": _pad([[1] * len(row) for row in ids], 0),
        "labels": _pad(labels, IGNORE),
    }


def prompt_batch(items: Sequence[Encoded], pad_id: int) -> dict[str, Tensor]:
    """input_ids and attention_mask (B, T), padded on the left so that generation continues them."""
    ids = [item.prompt_ids for item in items]
    return {
        "input_ids": _pad(ids, pad_id, side="left"),
        "attention_mask": _pad([[1] * len(row) for row in ids], 0, side="left"),
    }


def _pad(rows: list[list[int]], value: int, side: str = "right") -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in rows],
        batch_first=True,
        padding_value=value,
        padding_side=side,
    )

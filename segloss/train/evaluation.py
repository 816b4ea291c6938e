"""Held-out evaluation by task: loss, answers, choices among options, and what guessing scores.

Every score is [value, low, high] with a 95 % bootstrap interval over the items. An item is a row as
the trainer has tokenised it; what the model makes of it is its `found`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import chain, pairwise
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from pandas import DataFrame
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import GenerationConfig
from trl.data_utils import common_prefix_length

import segloss
from segloss.integrations.forward import loss_of
from segloss.integrations.window import IGNORE, next_tokens
from segloss.models.head import replaced, unwrapped

from .data import SLACK_TOKENS, Data, turns
from .errors import UserError, first_line


def item_of(row: dict, data: Data, trainer: Any) -> dict[str, Any]:
    """The row, where it has an answer with its prompt and its options as tokens too."""
    answer, tokenizer = row.get("answer"), trainer.processing_class
    prompt = row.get("prompt") or (row.get("messages") or [])[:-1]
    if answer is None or not prompt:
        return row
    lead = answer[: len(answer) - len(answer.lstrip())]
    options = [lead + o.lstrip() for o in row.get("options") or data.answers.get(row["task"], [])]
    if isinstance(prompt, str):
        texts = [prompt, *(prompt + option + tokenizer.eos_token for option in options)]
        prompt_ids, *whole = tokenizer(texts)["input_ids"]
        # a tokenizer may end a text of its own accord
        prompt_ids = prompt_ids[: common_prefix_length(prompt_ids, row["input_ids"])]
    else:
        replies = [{"role": "assistant", "content": option} for option in options]
        tools = json.loads(row["tools"]) if row.get("tools") else None
        more = {"chat_template": trainer.chat_template, "tools": tools}
        more |= row.get("chat_template_kwargs") or {}
        begun, spell = turns(prompt), tokenizer.apply_chat_template
        prompt_ids = spell(begun, add_generation_prompt=True, **more)["input_ids"]
        whole = [spell([*begun, reply], **more)["input_ids"] for reply in replies]
    option_ids = [ids[len(prompt_ids) :] for ids in whole]
    return row | {"prompt_ids": prompt_ids, "options": options, "option_ids": option_ids}


@torch.no_grad()
def evaluate(
    trainer: Any, items: Sequence[dict], title: str, generate: bool = True, precise: bool = False
) -> list[dict]:
    """What the model makes of each item, its `found`; a bar on a terminal shows how far it is.

    `nll`, `hits`, `entropy`, `tokens` are sums over the labels, `choice` and (with `generate`)
    `answer` texts. `precise`: in float32 whatever the training's precision.
    """
    state, size = trainer.accelerator, trainer.args.per_device_eval_batch_size
    order = sorted(range(len(items)), key=lambda i: len(items[i]["input_ids"]))
    own = order[state.process_index :: state.num_processes]
    hidden = None if state.is_main_process else True  # None: where there is no terminal
    config = unwrapped(trainer.model.eval()).config.get_text_config()
    precision = nullcontext() if precise else state.autocast()
    with replaced(config, "output_router_logits", False), precision:
        for start in tqdm(range(0, len(own), size), desc=title, disable=hidden):
            batch = [items[i] for i in own[start : start + size]]
            score(trainer, batch)
            answered = [item for item in batch if item.get("prompt_ids")]
            if answered and generate:
                answer(trainer, answered)
            if choosing := [item for item in answered if item["options"]]:
                choose(trainer, choosing)
    for i, found in gather_object([(i, items[i]["found"]) for i in own]):
        items[i]["found"] = found
    return [item["found"] for item in items]


def padded(trainer: Any, rows: Sequence[list[int]], side: str) -> Any:
    pad, device = trainer.processing_class.pad, trainer.args.device
    return pad({"input_ids": rows}, padding_side=side, return_tensors="pt").to(device)


def batch_of(trainer: Any, rows: Sequence[dict]) -> tuple[dict[str, Any], Tensor]:
    """What the model takes of some rows, and the tokens (B, T) that it is to predict."""
    labels = pad_sequence([torch.tensor(row["labels"]) for row in rows], True, IGNORE)
    inputs = padded(trainer, [row["input_ids"] for row in rows], "right")
    return {**inputs, "use_cache": False}, next_tokens(labels.to(trainer.args.device))


def score(trainer: Any, items: Sequence[dict]) -> None:
    inputs, target = batch_of(trainer, items)
    try:
        sums, _ = loss_of(trainer.model, sums_of, target, inputs, trainer.head == "fused")
    except (TypeError, ValueError, AttributeError) as error:
        broken = [n for n, w in trainer.model.named_parameters() if not w.isfinite().all()]
        text = f"{first_line(error)}; --head logits takes the model's own logits"
        raise UserError(f"the weights of {broken[0]} are not finite" if broken else text) from None
    for item, values in zip(items, sums.T.tolist(), strict=True):
        item["found"] = {"task": item["task"], "expected": item.get("answer")}
        item["found"] |= zip(("nll", "hits", "entropy", "tokens"), values, strict=True)


def sums_of(source: Any, target: Tensor) -> Tensor:
    """(4, B) negative log-probability, hits, entropy and number of the targets."""
    found: Any = segloss.logit_statistics(source, target, entropy=True, argmax=True)
    hits = (found.argmax == target) & found.valid
    values = [-found.log_prob.double(), hits, found.entropy.double(), found.valid]
    return torch.stack(values).sum(-1)


def continued(trainer: Any, items: Sequence[dict], new_tokens: int, **options: Any) -> Tensor:
    """(B, new) greedy continuations of the prompts, whatever the model says of generation."""
    tokenizer, base = trainer.processing_class, unwrapped(trainer.model)
    ends = getattr(base.generation_config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    greedy = GenerationConfig(eos_token_id=sorted(ends), pad_token_id=tokenizer.pad_token_id)
    inputs = padded(trainer, [item["prompt_ids"] for item in items], "left")
    with replaced(base, "generation_config", greedy):
        output = trainer.model.generate(**inputs, max_new_tokens=new_tokens, **options)
    return output[:, inputs["input_ids"].shape[1] :]


def answer(trainer: Any, items: Sequence[dict]) -> None:
    longest = max(len(item["input_ids"]) - len(item["prompt_ids"]) for item in items)
    new = continued(trainer, items, max(1, longest) + SLACK_TOKENS)
    texts = trainer.processing_class.batch_decode(new, skip_special_tokens=True)
    for item, text in zip(items, texts, strict=True):
        item["found"]["answer"] = text


def choose(trainer: Any, items: Sequence[dict]) -> None:
    """By greedy decoding in which only the options of each item may come."""
    width = max(len(item["prompt_ids"]) for item in items)
    end = trainer.processing_class.eos_token_id

    def allowed(place: int, ids: Tensor) -> list[int]:
        begun, options = ids[width:].tolist(), items[place]["option_ids"]
        at = len(begun)
        return [ids[at] for ids in options if ids[:at] == begun and at < len(ids)] or [end]

    # where no two are alike any more, mostly after one token, the rest is known
    options = [pairwise(sorted(item["option_ids"])) for item in items]
    alike = max(common_prefix_length(*two) for pairs in options for two in pairs)
    new = continued(trainer, items, alike + 1, prefix_allowed_tokens_fn=allowed)
    for item, begun in zip(items, new.tolist(), strict=True):
        pairs = zip(item["option_ids"], item["options"], strict=True)
        # the shortest, where one begins another
        fits = [(common_prefix_length(ids, begun), -len(ids), text) for ids, text in pairs]
        item["found"]["choice"] = max(fits)[-1].strip()


def results(items: Sequence[dict], data: Data, options: Any, seed: int = 0) -> list[dict]:
    """One row per task: its scores, and what the majority answer and chance score."""
    tasks = dict.fromkeys(item["task"] for item in items)
    rows = [[item for item in items if item["task"] == task] for task in tasks]
    return [task_result(some, data, options, seed) for some in rows]


def task_result(items: Sequence[dict], data: Data, options: Any, seed: int) -> dict[str, Any]:
    rows = DataFrame([{"options": item.get("options"), **item["found"]} for item in items])
    task, size, rng = items[0]["task"], len(items), np.random.default_rng(seed)
    if not np.isfinite(nll := sum(rows.nll)):
        raise UserError(
            f"the loss on the held-out items of {task!r} is {nll}: the model's weights or "
            "its arithmetic give numbers that are not finite"
        )
    draws = (np.bincount(rng.integers(size, size=size), minlength=size) for _ in range(1000))
    times = np.fromiter(chain([np.ones(size)], draws), (float, size))  # once, and in each draw

    def mean(values: Any, weights: Any = times[0]) -> np.ndarray:
        return times @ np.array(values, float) / (times @ np.array(weights))

    scores = {"nll": mean(rows.nll, rows.tokens), "token_accuracy": mean(rows.hits, rows.tokens)}
    result: dict[str, Any] = {"task": task, "items": size}
    result["entropy"] = float(rows.entropy.sum() / rows.tokens.sum())
    known = {name for name in rows if rows[name].notna().all()}
    if "answer" in known:
        scores["exact_match"] = mean(list(map(same, rows.answer, rows.expected)))
    usual = data.majority[task].strip() if task in data.majority else None
    if usual is not None and "expected" in known:
        right = sum(same(usual, answer) for answer in rows.expected)
        result["majority"] = {"answer": usual, "accuracy": right / size}
    if "choice" in known:
        true = rows.expected.map(str.strip)
        scores["accuracy"] = mean(true == rows.choice)
        result["chance"] = float((1 / rows.options.map(len)).mean())
        sets = {frozenset(map(str.strip, some)) for some in rows.options}
        if len(sets) == 1:
            counts = true.value_counts()  # of a test split's answers too that are no options
            classes = list(counts.index[counts >= options.min_class_items])
            result["classes"] = len(classes)
            scores["macro_f1"] = macro_f1(true, rows.choice, classes, times)
            if usual in {*sets.pop(), *counts.index}:
                result["majority"]["macro_f1"] = float(macro_f1(true, [usual] * size, classes))
    ends = {name: np.quantile(score[1:], [0.025, 0.975]) for name, score in scores.items()}
    return result | {name: [float(scores[name][0]), *ends[name].tolist()] for name in scores}


def macro_f1(true: Any, said: Any, classes: Sequence, times: Any = None) -> Any:
    """The mean over some classes of 2 TP / (2 TP + FP + FN), 0 where a class never occurs.

    With `times` (D, items), how often an item counts in each of D samples, it is that of each.
    """
    times, names = np.ones(len(true)) if times is None else times, np.array(classes, object)
    is_true, is_said = (np.array(some, object)[:, None] == names for some in (true, said))
    hits, both = times @ (is_true & is_said), times @ (is_true + 1.0 * is_said)
    return (2 * hits / np.maximum(both, 1)).sum(-1) / max(len(classes), 1)


def same(answer: str, expected: str | None) -> bool:
    """Whether a generated answer is the expected one.

    Both with case folded, white space collapsed, surrounding quotes and punctuation removed. Of the
    answer only as many lines count as are expected (one, mostly): a model that goes on after a
    right answer has still answered.
    """

    def lines(text: str) -> list[str]:
        plain = (" ".join(line.casefold().split()) for line in text.strip().splitlines())
        return [line.strip(" .,;:!?\"'`*") for line in plain]

    wanted = lines(expected or "")
    return lines(answer)[: len(wanted) or 1] == wanted

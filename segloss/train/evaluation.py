"""Held-out evaluation by task: loss, answers, choices among options, and what guessing scores.

Every score is [value, low, high] with a 95 % bootstrap interval over the items.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import GenerationConfig
from trl.data_utils import common_prefix_length

import segloss
from segloss.integrations.forward import loss_of
from segloss.integrations.transformers import unwrapped
from segloss.integrations.window import IGNORE, next_tokens
from segloss.models.head import replaced

from .data import SLACK_TOKENS, Data, turns
from .errors import UserError, first_line


@dataclass
class Item:
    """A held-out row, tokenised, and what the model makes of it."""

    task: str
    input_ids: list[int]
    labels: list[int]
    answer: str | None = None
    prompt_ids: list[int] = field(default_factory=list)  # empty where there is no answer to give
    options: list[str] = field(default_factory=list)
    option_ids: list[list[int]] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)
    """`nll`, `hits`, `entropy`, `tokens`: sums over the labels; `answer` and `choice`: texts."""


def item_of(row: dict, data: Data, trainer: Any) -> Item:
    """A row that the trainer has tokenised, with its prompt and options as tokens."""
    item = Item(row["task"], row["input_ids"], row["labels"], row.get("answer"))
    if item.answer is None:
        return item
    prompt = row["prompt"] if row.get("prompt") else row["messages"][:-1]
    item.prompt_ids = tokens(trainer, row, prompt, None)
    if isinstance(prompt, str):  # a tokenizer may end a text of its own accord
        item.prompt_ids = item.input_ids[: common_prefix_length(item.prompt_ids, item.input_ids)]
    lead = item.answer[: len(item.answer) - len(item.answer.lstrip())]
    options = row.get("options") or data.answers.get(item.task, [])
    item.options = [lead + option.lstrip() for option in options]
    full = [tokens(trainer, row, prompt, option) for option in item.options]
    item.option_ids = [ids[len(item.prompt_ids) :] for ids in full]
    return item


def tokens(trainer: Any, row: dict, prompt: Any, answer: str | None) -> list[int]:
    """As TRL tokenises a prompt alone, or with an answer to it."""
    tokenizer = trainer.processing_class
    if isinstance(prompt, str):
        text = prompt if answer is None else prompt + answer + tokenizer.eos_token
        return tokenizer(text)["input_ids"]
    reply = [] if answer is None else [{"role": "assistant", "content": answer}]
    return tokenizer.apply_chat_template(
        turns(prompt) + reply,
        add_generation_prompt=answer is None,
        chat_template=trainer.chat_template,
        tools=json.loads(row["tools"]) if row.get("tools") else None,
        return_dict=True,
        **(row.get("chat_template_kwargs") or {}),
    )["input_ids"]


@dataclass
class Evaluator:
    """Evaluates a trainer's model on items, those of each process apart."""

    trainer: Any
    generate: bool = True
    precise: bool = False  # in float32 whatever the training's precision

    @torch.no_grad()
    def __call__(self, items: Sequence[Item], title: str = "evaluating") -> None:
        """Fills `found` of every item; a bar on a terminal shows how far it is."""
        state, size = self.trainer.accelerator, self.trainer.args.per_device_eval_batch_size
        order = sorted(range(len(items)), key=lambda i: len(items[i].input_ids))
        own = order[state.process_index :: state.num_processes]
        hidden = None if state.is_main_process else True  # None: where there is no terminal
        with self._ready() as model:
            for start in tqdm(range(0, len(own), size), desc=title, disable=hidden):
                batch = [items[i] for i in own[start : start + size]]
                self._score(model, batch)
                answered = [item for item in batch if item.prompt_ids]
                if answered and self.generate:
                    self._answer(model, answered)
                if choosing := [item for item in answered if item.options]:
                    self._choose(model, choosing)
        for i, found in gather_object([(i, items[i].found) for i in own]):
            items[i].found = found

    @contextmanager
    def _ready(self) -> Iterator[Any]:
        """The model set to evaluate, without what its files say of generation or routers."""
        model, tokenizer = self.trainer.model, self.trainer.processing_class
        base = unwrapped(model)
        ends = getattr(base.generation_config, "eos_token_id", None)
        ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        greedy = GenerationConfig(
            eos_token_id=sorted(ends), pad_token_id=tokenizer.pad_token_id, do_sample=False
        )
        off: Any = False
        model.eval()
        with (
            replaced(base, "generation_config", greedy),
            replaced(base.config.get_text_config(), "output_router_logits", off),
            nullcontext() if self.precise else self.trainer.accelerator.autocast(),
        ):
            yield model

    def _inputs(self, rows: Sequence[list[int]], side: str = "right") -> Any:
        return self.trainer.processing_class.pad(
            {"input_ids": rows}, padding_side=side, return_tensors="pt"
        ).to(self.trainer.args.device)

    def _score(self, model: Any, items: list[Item]) -> None:
        inputs = {**self._inputs([item.input_ids for item in items]), "use_cache": False}
        labels = pad_sequence([torch.tensor(item.labels) for item in items], True, IGNORE)
        target = next_tokens(labels.to(self.trainer.args.device))
        try:
            sums, _ = loss_of(model, sums_of, target, inputs, self.trainer.head == "fused")
        except (TypeError, ValueError, AttributeError) as error:
            broken = [n for n, w in model.named_parameters() if not w.isfinite().all()]
            text = f"{first_line(error)}; --head logits takes the model's own logits"
            raise UserError(
                f"the weights of {broken[0]} are not finite" if broken else text
            ) from None
        for item, values in zip(items, sums.T.tolist(), strict=True):
            item.found = dict(zip(("nll", "hits", "entropy", "tokens"), values, strict=True))

    def _generate(self, model: Any, items: list[Item], new_tokens: int, **options: Any) -> Tensor:
        """(B, new) greedy continuations of the prompts."""
        inputs = self._inputs([item.prompt_ids for item in items], "left")
        output = model.generate(**inputs, max_new_tokens=new_tokens, **options)
        return output[:, inputs["input_ids"].shape[1] :]

    def _answer(self, model: Any, items: list[Item]) -> None:
        longest = max(len(item.input_ids) - len(item.prompt_ids) for item in items)
        new = self._generate(model, items, max(1, longest) + SLACK_TOKENS)
        texts = self.trainer.processing_class.batch_decode(new, skip_special_tokens=True)
        for item, answer in zip(items, texts, strict=True):
            item.found["answer"] = answer

    def _choose(self, model: Any, items: list[Item]) -> None:
        """Greedy decoding in which only the options of each item may come."""
        width = max(len(item.prompt_ids) for item in items)
        end = self.trainer.processing_class.eos_token_id

        def allowed(place: int, ids: Tensor) -> list[int]:
            return following(items[place].option_ids, ids[width:].tolist()) or [end]

        # where the first tokens differ, which is mostly, the rest is known
        apart = all(len({ids[0] for ids in i.option_ids}) == len(i.options) for i in items)
        longest = 1 if apart else max(len(ids) for item in items for ids in item.option_ids)
        new = self._generate(model, items, longest, prefix_allowed_tokens_fn=allowed)
        for item, begun in zip(items, new.tolist(), strict=True):
            item.found["choice"] = chosen(item, begun)


def sums_of(source: Any, target: Tensor) -> Tensor:
    """(4, B) negative log-probability, hits, entropy and number of the targets."""
    found: Any = segloss.logit_statistics(source, target, entropy=True, argmax=True)
    hits = (found.argmax == target) & found.valid
    values = [-found.log_prob.double(), hits, found.entropy.double(), found.valid]
    return torch.stack(values).sum(-1)


def following(options: Sequence[Sequence[int]], begun: list[int]) -> list[int]:
    """The tokens that may come next for one of the options to be the answer."""
    at = len(begun)
    return sorted({ids[at] for ids in options if list(ids[:at]) == begun and at < len(ids)})


def chosen(item: Item, new: list[int]) -> str:
    """The option that the tokens spell; the shortest, where one begins another."""
    options = zip(item.option_ids, item.options, strict=True)
    return min(options, key=lambda o: (-common_prefix_length(o[0], new), len(o[0])))[1].strip()


def results(items: Sequence[Item], data: Data, options: Any, seed: int = 0) -> list[dict]:
    """One row per task: its scores, and what the majority answer and chance score."""
    tasks = dict.fromkeys(item.task for item in items)
    return [task_result(t, [i for i in items if i.task == t], data, options, seed) for t in tasks]


def task_result(task: str, items: list[Item], data: Data, options: Any, seed: int) -> dict:
    names = ("nll", "hits", "entropy", "tokens")
    nll, hits, entropy, count = (np.array([i.found[name] for i in items]) for name in names)
    if not math.isfinite(nll.sum()):
        raise UserError(
            f"the loss on the held-out items of {task!r} is {nll.sum()}: the model's weights or "
            "its arithmetic give numbers that are not finite"
        )
    draws = np.random.default_rng(seed).integers(len(items), size=(1000, len(items)))

    def interval(score: Callable[[Any], float]) -> list[float]:
        low, high = np.quantile([score(draw) for draw in draws], [0.025, 0.975])
        return [float(score(slice(None))), float(low), float(high)]

    def mean(values: Any, weights: Any = None) -> list[float]:
        values = np.asarray(values, float)
        weights = np.ones_like(values) if weights is None else weights
        return interval(lambda i: values[i].sum() / weights[i].sum())

    result: dict[str, Any] = {"task": task, "items": len(items)}
    result |= {"nll": mean(nll, count), "token_accuracy": mean(hits, count)}
    result["entropy"] = float(entropy.sum() / count.sum())
    answers, usual = [(item.answer or "").strip() for item in items], data.majority.get(task)
    if all("answer" in item.found for item in items):
        result["exact_match"] = mean([same(i.found["answer"], i.answer) for i in items])
    if usual is not None and items[0].answer is not None:
        accuracy = np.mean([same(usual, item.answer) for item in items])
        result["majority"] = {"answer": usual.strip(), "accuracy": float(accuracy)}
    if not all("choice" in item.found for item in items):
        return result
    choices = [item.found["choice"] for item in items]
    result["accuracy"] = mean([a == b for a, b in zip(answers, choices, strict=True)])
    result["chance"] = float(np.mean([1 / len(item.options) for item in items]))
    sets = {frozenset(option.strip() for option in item.options) for item in items}
    if len(sets) == 1:
        # of a test split, with answers that training has none of
        places = {text: i for i, text in enumerate(sorted({*sets.pop(), *answers}))}
        true, said = (np.array([places[text] for text in some]) for some in (answers, choices))
        counted = [c for c in places.values() if (true == c).sum() >= options.min_class_items]
        result["classes"] = len(counted)
        result["macro_f1"] = interval(lambda i: macro_f1(true[i], said[i], counted))
        if usual is not None and usual.strip() in places:
            guess = np.full_like(true, places[usual.strip()])
            result["majority"]["macro_f1"] = macro_f1(true, guess, counted)
    return result


def macro_f1(true: np.ndarray, said: np.ndarray, classes: Sequence[int]) -> float:
    """The mean over some classes of 2 TP / (2 TP + FP + FN), 0 where a class never occurs."""
    size = int(max(true.max(), said.max(), *classes, 0)) + 1
    hits = np.bincount(true[true == said], minlength=size)
    both = np.bincount(true, minlength=size) + np.bincount(said, minlength=size)
    return float(np.mean([2 * hits[c] / max(both[c], 1) for c in classes])) if classes else 0.0


def normalise(text: str) -> str:
    """Case folded, white space collapsed, surrounding quotes and punctuation removed."""
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'`*")


def same(answer: str, expected: str | None) -> bool:
    """Whether a generated answer is the expected one, both normalised.

    Of the answer only as many lines count as are expected (one, mostly): a model that goes on after
    a right answer has still answered.
    """
    lines = (expected or "").strip().splitlines()
    answered = answer.strip().splitlines()[: len(lines)]
    return [normalise(line) for line in answered] == [normalise(line) for line in lines]

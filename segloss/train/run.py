"""One fine-tuning run, from the settings to the results."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import TrainConfig
from .errors import UserError
from .expression import parse_loss
from .tasks import Example, built_in_examples

if TYPE_CHECKING:
    import torch

    from .data import Encoded, TaskData
    from .evaluation import Evaluation
    from .run_folder import RunFolder

PACKAGES = ("transformers", "accelerate", "safetensors", "matplotlib")

# room in the time limit for the checkpoint, the plot and evaluation after training being slower
SPARE_SECONDS, SPARE_FACTOR = 15.0, 1.2


def train(config: TrainConfig) -> None:
    """Fine-tune, evaluate before and after, write the run folder and print the table.

    The order is such that nothing finished is lost: every input is checked before the folder is
    made, the first evaluation is on disk before training, the checkpoint before the second one.

    Raises `UserError` for anything the user can put right.
    """
    clock = Clock()
    config = config.resolved()
    run = _prepare(config)
    clock.lap("load")

    from .run_folder import RunFolder

    with RunFolder(config.output) as folder:
        folder.write_json("config.json", run.description)
        folder.require_room(run.checkpoint_bytes)
        before = _evaluate(run, folder, "before")
        folder.raise_failures()
        reserve = SPARE_SECONDS + SPARE_FACTOR * clock.lap("evaluate_before")

        losses, stopped = _fit(run, folder, clock.deadline(config.time_limit, reserve))
        clock.lap("train")
        folder.write("checkpoint", partial(_save, run))

        after = _evaluate(run, folder, "after")
        clock.lap("evaluate_after")
        timing = {**clock.seconds, "total": clock.total()}
        timing |= {"steps": len(losses), "stopped_by_time_limit": stopped}
        _report(run, folder, losses, before, after, timing)


def say(text: str) -> None:
    """Progress goes to stderr; stdout holds the results."""
    print(text, file=sys.stderr, flush=True)


class Clock:
    """Seconds of each phase of the run."""

    def __init__(self):
        self.start = self.last = time.monotonic()
        self.seconds: dict[str, float] = {}

    def lap(self, phase: str) -> float:
        now = time.monotonic()
        self.seconds[phase] = round(now - self.last, 1)
        self.last = now
        return self.seconds[phase]

    def total(self) -> float:
        return round(time.monotonic() - self.start, 1)

    def deadline(self, limit: float | None, reserve: float) -> float:
        """When training must end for the whole run to take `limit` seconds; 0 or None is never."""
        return self.start + limit - reserve if limit else float("inf")


# ------------------------------------------------------------------------------------- prepare


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything a run needs, checked."""

    config: TrainConfig
    loss: torch.nn.Module
    model: Any
    tokenizer: Any
    tasks: list[TaskData]
    arguments: Any
    """transformers' TrainingArguments, which also know the device."""
    dtype: torch.dtype | None
    """What the forward pass computes in; None for the weights' own float32."""
    description: dict
    """What config.json says: enough to do the run again."""

    @property
    def checkpoint_bytes(self) -> int:
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        return int(1.1 * weights)


def _prepare(config: TrainConfig) -> Run:
    """Check every input, the quick ones first, and load the model."""
    _require_packages()
    loss = parse_loss(config.loss)
    examples = _examples(config)
    _require_new(config.output)
    _quiet_transformers()

    from . import data, model

    say(f"loading {config.model}")
    network, tokenizer = model.load(config.model)
    encoded = _short_enough(data.encode(examples, tokenizer), config)
    tasks = data.split(encoded, config.eval_items, config.seed)
    _require_positions(network, tasks, config)
    counts = _counts(examples, encoded, tasks)
    arguments = _training_arguments(config)
    dtype = forward_dtype(config.precision, arguments.device)
    network.to(arguments.device)
    description = _description(config, dtype, arguments.device, counts)
    return Run(config, loss, network, tokenizer, tasks, arguments, dtype, description)


def _require_packages() -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"segloss train needs {', '.join(missing)}, which is not installed: "
            "pip install 'segloss[train]'"
        )


def _require_new(output: str) -> None:
    if os.path.lexists(output):
        from .run_folder import exists

        raise exists(output)


def _examples(config: TrainConfig) -> list[Example]:
    if not config.data:
        return built_in_examples(config.tasks)
    from .data import read_jsonl

    return [example for path in config.data for example in read_jsonl(path)]


def _quiet_transformers() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _short_enough(encoded: list[Encoded], config: TrainConfig) -> list[Encoded]:
    """The examples within the limits, of which every task must have some."""
    from .data import within_limits

    kept = within_limits(encoded, config.max_prompt_tokens, config.max_completion_tokens)
    left = {item.example.task for item in kept}
    for item in encoded:
        if item.example.task not in left:
            raise UserError(
                f"task {item.example.task!r} has no example within --max-prompt-tokens "
                f"{config.max_prompt_tokens} and --max-completion-tokens "
                f"{config.max_completion_tokens}"
            )
    return kept


def _require_positions(network, tasks: Sequence[TaskData], config: TrainConfig) -> None:
    """A prompt and an answer must fit into the positions the model knows."""
    from .evaluation import SLACK_TOKENS

    positions = getattr(network.config, "max_position_embeddings", None)
    items = [item for task in tasks for item in task.train + task.held_out]
    longest = max(len(item.prompt_ids) for item in items) + SLACK_TOKENS
    longest += max(len(item.completion_ids) for item in items)
    if positions is not None and longest > positions:
        raise UserError(
            f"{config.model} reads at most {positions} tokens, and the longest prompt and "
            f"completion need {longest}; lower --max-prompt-tokens or --max-completion-tokens"
        )


def _counts(
    examples: Sequence[Example], encoded: Sequence[Encoded], tasks: Sequence[TaskData]
) -> dict[str, dict[str, int]]:
    """Examples of each task: read, short enough, trained on, held out."""
    counts = {}
    for task in tasks:
        counts[task.task] = count = {
            "examples": sum(example.task == task.task for example in examples),
            "short_enough": sum(item.example.task == task.task for item in encoded),
            "train": len(task.train),
            "held_out": len(task.held_out),
        }
        say(
            f"{task.task}: {count['examples']} examples, {count['short_enough']} short enough; "
            f"{count['train']} to train on, {count['held_out']} held out"
        )
    return counts


def forward_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype, None for the weights' own float32."""
    import torch

    from segloss.doctor import cpu_flags

    if precision == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            native = device.type == "cpu" and bool(BFLOAT16_FLAGS & cpu_flags())
        precision = "bfloat16" if native else "float32"
    return torch.bfloat16 if precision == "bfloat16" else None


BFLOAT16_FLAGS = {"amx_bf16", "avx512_bf16", "bf16"}  # x86, x86, ARM


def _training_arguments(config: TrainConfig):
    from transformers import TrainingArguments

    arguments = TrainingArguments(
        output_dir=config.output,
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.lr,
        weight_decay=config.weight_decay,
        warmup_steps=max(1, config.steps // 10),
        lr_scheduler_type="linear",
        seed=config.seed,
        train_sampling_strategy="sequential",  # `training_order` has drawn the order
        remove_unused_columns=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=False,
        dataloader_pin_memory=False,
    )
    if arguments.device.type == "cuda":
        # several visible GPUs would mean DataParallel, which splits a batch and its count of tokens
        arguments._n_gpu = 1
    return arguments


def _description(config: TrainConfig, dtype, device, counts: dict) -> dict:
    import torch

    names = ("segloss", "torch", "transformers", "numpy")
    return {
        "settings": dataclasses.asdict(config),
        "forward_dtype": "float32" if dtype is None else str(dtype).removeprefix("torch."),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in names},
        "data": counts,
    }


# ----------------------------------------------------------------------------------------- fit


def _fit(run: Run, folder: RunFolder, deadline: float) -> tuple[list[float], bool]:
    """Train; (loss of each step, whether the time limit ended it)."""
    from . import data, trainer

    config = run.config
    limit = trainer.TimeLimit(deadline)
    loop = trainer.LossTrainer(
        model=run.model,
        args=run.arguments,
        train_dataset=data.training_order(
            run.tasks, config.steps * config.batch_size * config.accumulation, config.seed
        ),
        data_collator=partial(data.training_batch, pad_id=run.tokenizer.pad_token_id),
        loss=run.loss,
        autocast=run.dtype,
        head=config.head,
        callbacks=[trainer.MetricsLog(folder), limit],
    )
    loop.remove_callback(trainer.ProgressCallback)
    loop.add_callback(trainer.Progress())
    loop.train()
    return [row["loss"] for row in loop.state.log_history if "loss" in row], limit.reached


def _save(run: Run, path: Path) -> None:
    run.model.save_pretrained(path)
    run.tokenizer.save_pretrained(path)


# ------------------------------------------------------------------------- evaluate and report


def _evaluate(run: Run, folder: RunFolder, phase: str) -> dict[str, Evaluation]:
    """Evaluate every task; the results are on disk when this returns."""
    from tqdm.auto import tqdm

    from .evaluation import Evaluator

    evaluator = Evaluator(run.tokenizer, run.config.batch_size, run.dtype, run.config.head)
    results: dict[str, Evaluation] = {}
    lines: list[str] = []
    total = sum(len(task.held_out) for task in run.tasks)
    with tqdm(total=total, desc=f"evaluating {phase}", dynamic_ncols=True) as bar:
        for task in run.tasks:
            result = results[task.task] = evaluator(run.model, task, bar.update)
            scores = {"loss": result.loss, "exact_match": result.exact_match}
            folder.log("evaluation", phase=phase, task=task.task, **scores)
            lines += _answer_lines(task, result)
    folder.write_text(f"answers-{phase}.jsonl", "".join(lines))
    return results


def _answer_lines(task: TaskData, result: Evaluation) -> list[str]:
    rows = [
        {
            "task": task.task,
            "prompt": item.example.prompt,
            "completion": item.example.completion,
            "answer": answer,
            "correct": correct,
        }
        for item, answer, correct in zip(task.held_out, result.answers, result.correct, strict=True)
    ]
    return [json.dumps(row) + "\n" for row in rows]


def _report(run: Run, folder: RunFolder, losses: list[float], before, after, timing: dict) -> None:
    """Write the plot and the results, and print the table."""
    from . import report

    config = run.config
    results = [
        report.task_result(task, before[task.task], after[task.task], config.seed)
        for task in run.tasks
    ]
    folder.write(
        "loss.png", partial(report.plot, losses=losses, results=results, loss_name=config.loss)
    )
    folder.write_json("results.json", report.as_json(results, timing))
    text = f"{report.table(results)}\n\n{report.NOTES}\n\n{_story(config, timing)}\n"
    folder.write_text("results.md", text)
    print(f"\n{text}\nrun folder: {folder.path}", flush=True)


def _story(config: TrainConfig, timing: dict) -> str:
    """One paragraph: what was trained, for how long, and whether the time limit cut it short."""
    text = (
        f"{config.model}, loss {config.loss}: {timing['steps']} steps of "
        f"{config.batch_size * config.accumulation} examples in {timing['train']:.0f} s; "
        f"{timing['total']:.0f} s in all (loading {timing['load']:.0f} s, evaluation before "
        f"{timing['evaluate_before']:.0f} s, after {timing['evaluate_after']:.0f} s)."
    )
    if timing["stopped_by_time_limit"]:
        text += (
            f" Training stopped at step {timing['steps']} of {config.steps} to keep to the time "
            f"limit of {config.time_limit:.0f} s (--time-limit)."
        )
    return text

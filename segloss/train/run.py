"""One fine-tuning run, from the settings or from a checkpoint to the results."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import TrainConfig, read_settings
from .errors import UserError
from .expression import parse_loss
from .run_folder import ADAPTER, BEST, FINAL, RESUME, RunFolder, exists, finished
from .tasks import Example, built_in_examples

if TYPE_CHECKING:
    import torch

    from segloss.losses import Loss

    from .checkpoint import Checkpoint
    from .data import Encoded, TaskData
    from .evaluation import Evaluation, Evaluator

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
    _require_new(config.output)
    run = prepare(config)
    clock.lap("load")

    with RunFolder(config.output, run.description) as folder:
        _run(run, folder, clock, None)


def resume(path: str, time_limit: float | None = None) -> None:
    """Go on with an interrupted run, from its last whole checkpoint or from its beginning.

    It ends as it would have ended uninterrupted, on a CPU bit for bit: weights, metrics, results.
    `time_limit` replaces the run's own and counts from now. Raises `UserError` as `train`, and
    where the folder is no run's, the run is finished or going on, or its data or model changed.
    """
    clock = Clock()
    config, description = _interrupted(path)
    if time_limit is not None:
        config = dataclasses.replace(config, time_limit=time_limit)
    run = prepare(config)
    _require_same(description, run.description, path)
    clock.lap("load")

    with RunFolder.reopen(path) as folder:
        _run(run, folder, clock, _last_checkpoint(folder))


def _run(run: Run, folder: RunFolder, clock: Clock, checkpoint: Checkpoint | None) -> None:
    """From an empty run folder, or one that `checkpoint` is in, to the results."""
    from .fit import Fit

    config = run.config
    folder.require_room(run.checkpoint_bytes)
    rows = folder.cut_metrics(checkpoint.state["metrics_bytes"] if checkpoint else 0)
    if checkpoint is None:
        before = _evaluate(run, folder, "before")
        folder.raise_failures()
        clock.lap("evaluate_before")
    else:
        before = _read_evaluations(run, folder, rows)
        clock.seconds |= checkpoint.state["timing"]
    reserve = SPARE_SECONDS + SPARE_FACTOR * clock.seconds["evaluate_before"]
    fit = Fit(run, folder, clock, deadline=clock.deadline(config.time_limit, reserve))
    fit.losses = [row["loss"] for row in rows if row["event"] == "step"]
    fit.train(checkpoint)
    clock.seconds["train"] = round(fit.trainer.seconds, 1)

    run = _merged(run, folder)
    folder.write(FINAL, partial(_save, run))
    clock.skip()
    after = _evaluate(run, folder, "after")
    clock.lap("evaluate_after")
    timing = {**clock.seconds, "total": clock.total(), "steps": fit.num_steps}
    timing |= {"stopped_by_time_limit": fit.stopped == "time limit"}
    timing |= {"stopped_by_patience": fit.stopped == "patience"}
    timing |= {"kept_step": fit.kept_step}
    _report(run, folder, fit.losses, before, after, timing)
    if finished(folder.path):
        shutil.rmtree(folder.path / BEST, ignore_errors=True)


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

    def skip(self) -> None:
        """Count the time since the last lap to no phase."""
        self.last = time.monotonic()

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
    loss: Loss
    model: Any
    """On its device, in float32; with LoRA, peft's model around it."""
    tokenizer: Any
    tasks: list[TaskData]
    device: torch.device
    dtype: torch.dtype | None
    """What the forward pass computes in; None for the weights' own float32."""
    description: dict
    """What config.json says: enough to do the run again."""

    @property
    def checkpoint_bytes(self) -> int:
        """Of everything the run will have on disk at once."""
        sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in self.model.parameters()]
        trained = sum(size for size, trains in sizes if trains)
        states = (self.config.keep + 1) * 3 * trained if self.config.save_every else 0
        bests = (self.config.keep if self.config.save_every else 0) + 2
        best = bests * trained if self.config.patience else 0
        return int(1.1 * (sum(size for size, _ in sizes) + states + best))

    @property
    def evaluator(self) -> Evaluator:
        from .evaluation import Evaluator

        return Evaluator(self.tokenizer, self.config.batch_size, self.dtype, self.config.head)


def prepare(config: TrainConfig, to_train: bool = True) -> Run:
    """Check every input, the quick ones first, and load the model.

    `config` is resolved. Without `to_train` all examples of a task may be held out, and the model
    gets no adapters.
    """
    _require_packages(config)
    loss = parse_loss(config.loss)
    examples = _examples(config)
    one_task = len({example.task for example in examples}) < 2
    if to_train and config.task_weights == "coba" and one_task:
        raise UserError("--task-weights coba weighs tasks against each other; there is only 1")
    _quiet_transformers()

    import torch

    from segloss.doctor import device as default_device

    from . import data, model

    device = default_device()
    say(f"loading {config.model}")
    network, tokenizer = model.load(config.model)
    encoded = _short_enough(data.encode(examples, tokenizer), config)
    tasks = data.split(
        encoded, config.eval_items, config.seed, config.validation_items or 0, to_train
    )
    _require_positions(network, tasks, config)
    counts = _counts(examples, encoded, tasks)
    dtype = forward_dtype(config.precision, device)
    network.to(device)
    description = _description(config, dtype, device, counts)
    description["fingerprints"] = {"data": _data_hash(tasks), "model": _model_hash(network)}
    if config.lora_rank and to_train:
        from . import lora

        torch.manual_seed(config.seed)  # the adapters begin at random
        network = lora.attach(network, config)
    return Run(config, loss, network, tokenizer, tasks, device, dtype, description)


def _require_packages(config: TrainConfig) -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"segloss train needs {', '.join(missing)}, which is not installed: "
            "pip install 'segloss[train]'"
        )
    if config.lora_rank:
        from .lora import require_peft

        require_peft()
    if config.tensorboard:
        from .board import require_tensorboard

        require_tensorboard()


def _require_new(output: str) -> None:
    if os.path.lexists(output):
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
    items = [item for task in tasks for item in task.train + task.held_out + task.validation]
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


def _data_hash(tasks: Sequence[TaskData]) -> str:
    """Of every token of every part, in order: what training and evaluation read."""
    digest = hashlib.sha256()
    for task in tasks:
        for part in (task.train, task.held_out, task.validation):
            rows = [[item.prompt_ids, item.completion_ids] for item in part]
            digest.update(json.dumps([task.task, rows]).encode())
    return digest.hexdigest()


def _model_hash(network: torch.nn.Module) -> str:
    """Of the beginning of every weight: enough to tell models apart, without reading them all."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.flatten()[:1024].float().cpu().numpy().tobytes())
    return digest.hexdigest()


# -------------------------------------------------------------------------------------- resume


def _interrupted(path: str) -> tuple[TrainConfig, dict]:
    """The settings and the config.json of a run that has not finished."""
    file = Path(path) / "config.json"
    if not os.path.isdir(path):
        raise UserError(f"--resume {path}: no such run folder")
    if not file.is_file():
        raise UserError(f"--resume {path}: there is no config.json, so it is no run's folder")
    if finished(Path(path)):
        raise UserError(f"--resume {path}: the run is finished, its results are in results.md")
    if kind_of(file) != "train":
        raise UserError(f"--resume {path}: its config.json is not that of a segloss train run")
    settings = read_settings(str(file), TrainConfig)
    return TrainConfig(**(settings | {"output": path})), json.loads(file.read_text("utf-8"))


def kind_of(file: Path) -> str:
    """Whose config.json it is: "train", "select", or "" for another's, such as a model's."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return "select" if "target" in settings else "train"


def _require_same(then: dict, now: dict, path: str) -> None:
    """Refuse other data or another model; say what may change the last bits."""
    for what, value in then.get("fingerprints", {}).items():
        if value != now["fingerprints"][what]:
            raise UserError(f"--resume {path}: the {what} changed since the run began")
    for key in ("versions", "device", "forward_dtype", "threads"):
        if then.get(key) != now[key]:
            say(f"note: {key} was {then.get(key)}, is {now[key]}: the last bits may differ")


def _last_checkpoint(folder: RunFolder) -> Checkpoint | None:
    """The newest whole checkpoint; damaged ones are named. None where there is none."""
    from . import checkpoint

    states = folder.path / RESUME
    lines = folder.metrics_size() or 0
    for step in reversed(checkpoint.steps(states)):
        try:
            found = checkpoint.read(states, step)
            if found.state["metrics_bytes"] > lines:
                raise checkpoint.Damaged("metrics.jsonl has lost lines that it builds on")
        except checkpoint.Damaged as damage:
            say(f"checkpoint {states}/step-{step:08d} is damaged: {damage}; trying the one before")
            continue
        say(f"resuming after step {step}")
        # damaged ones would take the place of new ones among those that are kept
        checkpoint.prune(states, [s for s in checkpoint.steps(states) if s <= step])
        return found
    say("there is no whole checkpoint: starting at the beginning")
    checkpoint.prune(states, [])
    return None


# ---------------------------------------------------------------------------------------- model


def _merged(run: Run, folder: RunFolder) -> Run:
    """The run with a plain model; adapters are written down and merged into it."""
    if not run.config.lora_rank:
        return run
    from . import lora

    # the embeddings did not change: peft would look for the base model to find that out
    folder.write(ADAPTER, partial(run.model.save_pretrained, save_embedding_layers=False))
    return dataclasses.replace(run, model=lora.merge(run.model))


def _save(run: Run, path: Path) -> None:
    run.model.save_pretrained(path)
    run.tokenizer.save_pretrained(path)


# ------------------------------------------------------------------------- evaluate and report


def _evaluate(run: Run, folder: RunFolder, phase: str) -> dict[str, Evaluation]:
    """Evaluate every task; the results are on disk when this returns."""
    results: dict[str, Evaluation] = {}
    lines: list[str] = []
    for task, result in evaluations(run, f"evaluating {phase}"):
        results[task.task] = result
        folder.log("evaluation", phase=phase, task=task.task, **result.scores)
        lines += _answer_lines(task, result)
    folder.write_text(f"answers-{phase}.jsonl", "".join(lines))
    return results


def evaluations(run: Run, title: str) -> Iterator[tuple[TaskData, Evaluation]]:
    """Each task with its result, under a progress bar."""
    from tqdm.auto import tqdm

    total = sum(len(task.held_out) for task in run.tasks)
    with tqdm(total=total, desc=title, dynamic_ncols=True) as bar:
        for task in run.tasks:
            yield task, run.evaluator(run.model, task, bar.update)


def _read_evaluations(run: Run, folder: RunFolder, rows: list[dict]) -> dict[str, Evaluation]:
    """The evaluation before training, from the files it was written to."""
    from .evaluation import Evaluation

    text = (folder.path / "answers-before.jsonl").read_text(encoding="utf-8")
    answers = [json.loads(line) for line in text.splitlines()]
    results = {}
    for row in rows:
        if row["event"] == "evaluation":
            own = [answer for answer in answers if answer["task"] == row["task"]]
            results[row["task"]] = Evaluation(
                loss=row["loss"],
                correct=[answer["correct"] for answer in own],
                answers=[answer["answer"] for answer in own],
                token_accuracy=row["token_accuracy"],
                entropy=row["entropy"],
            )
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
    text = f"{report.table(results)}\n\n{report.NOTES}\n\n{_story(config, timing)}\n"
    folder.write_text("results.md", text)
    folder.write_json("results.json", report.as_json(results, timing))  # last: a run is finished
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
    if timing["stopped_by_patience"]:
        text += (
            f" Training stopped at step {timing['steps']} of {config.steps}: no lower validation "
            f"loss in {config.patience} validations (--patience)."
        )
    if timing["kept_step"] != timing["steps"]:
        text += f" The weights are those of step {timing['kept_step']}, the lowest of them."
    return text

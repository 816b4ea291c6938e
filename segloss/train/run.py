"""One fine-tuning run, from the settings or from a checkpoint to the results."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import pickle
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import segloss

from .config import Settings
from .errors import UserError, first_line
from .report import METRICS, RESULTS, SETTINGS

if TYPE_CHECKING:
    from .data import Data
    from .evaluation import Item
    from .trainer import Trainer

TRAINED, BEFORE, TABLE = "trained.json", "before.json", "results.md"
PACKAGES = ("trl", "transformers", "datasets", "accelerate", "peft", "safetensors", "yaml")
# room in the time limit for what is written, and for evaluation after training being slower
SPARE_SECONDS, SPARE_FACTOR = 10.0, 1.2


class Interrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C; the text says how to go on."""


def require_packages(names: Sequence[str] = PACKAGES) -> None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        needed = " ".join("pyyaml" if name == "yaml" else name for name in missing)
        raise UserError(f"{', '.join(missing)} not installed: pip install {needed}")


def train(settings: Settings, resumed: bool = False) -> None:
    """Fine-tune, evaluate, write the output folder and print the table.

    The order is such that nothing finished is lost: every input is checked before the folder is
    made, and what is finished is on disk before the next thing begins. `resumed`: go on with the
    run that is in the folder, from its last whole checkpoint or its beginning; on a CPU it ends in
    the same bits as it would have.

    Raises `UserError` for anything the user can put right.
    """
    start = time.monotonic()
    output = Path(settings.training.output_dir)
    if not resumed:
        require_new(output, settings)
    run = prepare(settings)
    timing = {"load": time.monotonic() - start}
    run.open(resumed)
    with run.alone():
        before = run.before(timing)
        stopped, steps = run.fit(start, timing, resumed)
        run.after(start, timing, before, stopped, steps)


def require_new(output: Path, settings: Settings) -> None:
    """A run's folder is never written twice."""
    if settings.training.resume_from_checkpoint:
        return
    if (output / SETTINGS).exists() or (output.exists() and not output.is_dir()):
        raise UserError(
            f"{output} holds a run already: segloss train --resume {output} goes on with it, "
            "another --output_dir begins anew"
        )


@dataclass
class Run:
    """A trainer with its data, and what becomes of them."""

    settings: Settings
    trainer: Trainer
    data: Data
    held_out: list[Item]
    description: dict[str, Any]
    """What segloss.json says: enough to do the run again."""
    model_name: str
    is_gguf: bool

    @property
    def output(self) -> Path:
        return Path(self.settings.training.output_dir)

    @property
    def is_main(self) -> bool:
        return self.trainer.accelerator.is_main_process

    def open(self, resumed: bool) -> None:
        """Make the folder, or see that it is this run's."""
        from .data import say

        file = self.output / SETTINGS
        if resumed:
            then = json.loads(file.read_text(encoding="utf-8"))
            for what, value in then.get("fingerprints", {}).items():
                if value != self.description["fingerprints"][what]:
                    raise UserError(f"--resume {self.output}: the {what} changed since it began")
            for key in ("versions", "device", "threads", "processes"):
                now = self.description[key]
                if then.get(key) != now:
                    say(f"note: {key} was {then.get(key)}, is {now}: the last bits may differ")
        elif self.is_main:
            sizes = [(p.nbytes, p.requires_grad) for p in self.trainer.model.parameters()]
            states = 6 * sum(size for size, trains in sizes if trains)
            needed = sum(size for size, _ in sizes)
            needed += states * (self.trainer.args.save_strategy != "no")
            try:
                self.output.mkdir(parents=True, exist_ok=True)
                free = shutil.disk_usage(self.output).free
                if free < needed:
                    raise UserError(
                        f"{self.output} has {free / 1e6:.0f} MB of free disk space; model and two "
                        f"checkpoints need {needed / 1e6:.0f} MB (--save_strategy no: none of them)"
                    )
                write(file, self.description)
            except OSError as error:
                raise UserError(f"cannot write to {self.output}: {error.strerror}") from None
        self.trainer.accelerator.wait_for_everyone()

    def alone(self) -> contextlib.AbstractContextManager:
        """Of the first process: nobody else may be at work in the folder."""
        from .trainer import locked

        return locked(self.output / METRICS) if self.is_main else contextlib.nullcontext()

    def before(self, timing: dict[str, float]) -> list[dict] | None:
        """The results before training, from the file that an interrupted run has left."""
        if not self.settings.options.evaluate_before or not self.held_out:
            return None
        file = self.output / BEFORE
        if not file.exists():
            found = self.evaluate("evaluating before", timing)
            if self.is_main:
                self.save(BEFORE, {"seconds": timing["evaluating before"], "tasks": found})
            self.trainer.accelerator.wait_for_everyone()
        stored = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        timing["evaluating before"] = stored.get("seconds", timing.get("evaluating before", 0.0))
        return stored.get("tasks", found if not stored else None)

    def evaluate(self, title: str, timing: dict[str, float]) -> list[dict]:
        """One row of scores per task; beside them the answers, in answers-TITLE.jsonl."""
        from . import evaluation

        start = time.monotonic()
        options = self.settings.options
        evaluator = evaluation.Evaluator(self.trainer, options.head, options.exact_match)
        with progress(title, len(self.held_out), self.is_main) as report:
            evaluator(self.held_out, report)
        timing[title] = time.monotonic() - start
        answers = [
            {"task": item.task, "expected": item.answer, **item.found} for item in self.held_out
        ]
        if self.is_main and self.output.is_dir():
            lines = "".join(json.dumps(answer) + "\n" for answer in answers)
            name = f"answers-{title.rpartition(' ')[2]}.jsonl"
            self.trainer.attempt(name, lambda: (self.output / name).write_text(lines, "utf-8"))
        return evaluation.results(self.held_out, self.data, options, self.trainer.args.seed)

    def fit(self, start: float, timing: dict[str, float], resumed: bool) -> tuple[str, int]:
        """Train, and leave the model in the folder; (what ended it early, steps)."""
        from .trainer import Recorder, last_whole

        trainer, options = self.trainer, self.settings.options
        done = self.output / TRAINED
        if resumed and done.exists():
            found = json.loads(done.read_text(encoding="utf-8"))
            trainer._load_from_checkpoint(str(self.output))
            timing["training"] = found["seconds"]
            return found["stopped"], found["steps"]
        checkpoint: Any = self.settings.training.resume_from_checkpoint
        if resumed or str(checkpoint).lower() == "true":
            checkpoint = last_whole(self.output, self.is_main)
            trainer.accelerator.wait_for_everyone()
        reserve = SPARE_SECONDS + SPARE_FACTOR * timing.get("evaluating before", 0.0)
        limit = options.time_limit
        recorder = Recorder(
            *(trainer, self.data.tasks, start + limit - reserve if limit else math.inf),
            coba=self.validation_callback(),
        )
        trainer.add_callback(recorder)
        begun = time.monotonic()
        state = None if checkpoint is None else Path(checkpoint) / "trainer_state.json"
        past = json.loads(state.read_text("utf-8")) if state and state.exists() else {}
        last = trainer.args.max_steps if trainer.args.max_steps > 0 else past.get("max_steps")
        if past and past["global_step"] >= last:
            trainer._load_from_checkpoint(str(checkpoint))
            trainer.state.global_step = past["global_step"]
        else:
            try:
                trainer.train(str(checkpoint) if checkpoint else None)
            except pickle.UnpicklingError as error:
                raise UserError(
                    f"{checkpoint} holds a pickle that torch.load(weights_only=True) refuses: "
                    f"{first_line(error)}"
                ) from None
        timing["training"] = time.monotonic() - begun
        steps = trainer.state.global_step
        if recorder.stopped == "interrupt":
            saved = f"{self.output}/checkpoint-{steps}"
            if trainer.failures:
                raise UserError(f"interrupted, and could not write {'; '.join(trainer.failures)}")
            raise Interrupted(
                f"interrupted after step {steps}, saved in {saved}: segloss train --resume "
                f"{self.output} goes on from there"
            )
        stopped = recorder.stopped
        if not stopped and steps < trainer.state.max_steps:
            stopped = "patience"
        if self.leave_model() and self.is_main:
            self.save(TRAINED, {"steps": steps, "stopped": stopped, "seconds": timing["training"]})
        return stopped, steps

    def validation_callback(self) -> Any:
        """What measures CoBa's losses, on items of each task in turn."""
        coba: Any = self.trainer.task_weights
        if coba is None:
            return None
        from segloss.integrations.transformers import CoBaCallback

        by_task: dict[str, list[dict]] = {}
        for row in self.trainer.validation:
            by_task.setdefault(row["task"], []).append(row)
        count, batches = self.settings.options.validation_batch, []
        for i in range(0, max(map(len, by_task.values())), count):
            rows = [row for rows in by_task.values() for row in rows[i : i + count]]
            names = ("input_ids", "labels", "task_ids")
            batch = self.trainer.data_collator([{n: row[n] for n in names} for row in rows])
            batches.append(batch)
        callback = CoBaCallback(coba, batches, head=self.settings.options.head)
        self.trainer.add_callback(callback)
        return callback

    def leave_model(self) -> bool:
        """The model, or its adapter, with the tokenizer, as `from_pretrained` reads them."""
        trainer = self.trainer
        written = trainer.attempt("the model", lambda: trainer.save_model(str(self.output)))
        merge = self.settings.options.merge
        adapted = hasattr(trainer.model, "merge_and_unload")
        if adapted and (self.is_gguf if merge is None else merge) and self.is_main:
            written &= trainer.attempt("merged", self._merge)
        return written

    def _merge(self) -> None:
        """The adapters' products added to the weights, in a copy that training does not see."""
        import copy

        import torch

        model = copy.deepcopy(self.trainer.model).cpu()
        base = model.get_base_model()
        head = base.get_output_embeddings()
        if hasattr(head, "lora_A") and head.base_layer.weight is base.get_input_embeddings().weight:
            # an adapter on a shared weight would change the embeddings as well
            head.base_layer.weight = torch.nn.Parameter(head.base_layer.weight.detach().clone())
            base.config.tie_word_embeddings = False
            base.all_tied_weights_keys = {}  # what saving leaves out
        merged = model.merge_and_unload()
        merged.save_pretrained(self.output / "merged")
        self.trainer.processing_class.save_pretrained(self.output / "merged")

    def after(
        self, start: float, timing: dict, before: list | None, stopped: str, steps: int
    ) -> None:
        """Evaluate, write the results, and print them."""
        from . import report

        after = self.evaluate("evaluating after", timing) if self.held_out else []
        timing = {name: round(seconds, 1) for name, seconds in timing.items()}
        timing["total"] = round(time.monotonic() - start, 1)
        args = self.trainer.args
        examples = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        found = {
            "tasks": after, "before": before, "timing": timing, "steps": steps,
            "examples_per_step": examples, "stopped": stopped,
        }  # fmt: skip
        if self.is_main:
            self.save(RESULTS, found)
            record = report.Record.of(self.output, self.description, found)
            text = f"{report.markdown([record])}\n\n{report.story(record)}\n"
            self.trainer.attempt(TABLE, lambda: (self.output / TABLE).write_text(text, "utf-8"))
            print(f"\n{text}\n{self.output}", flush=True)
        if args.push_to_hub:
            self.trainer.push_to_hub(dataset_name=self.settings.script.dataset_name)
        if self.trainer.failures:
            failed = "; ".join(dict.fromkeys(self.trainer.failures))
            raise UserError(f"could not write to {self.output}: {failed}")

    def save(self, name: str, value: Any) -> None:
        self.trainer.attempt(name, lambda: write(self.output / name, value))


def write(path: Path, value: Any) -> None:
    """JSON, all of it or nothing."""
    partial = path.with_name(f"partial-{path.name}")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    partial.rename(path)


def progress(title: str, total: int, shown: bool):
    """A context whose value is called with the items done: a bar on a terminal, lines elsewhere."""
    from .data import say

    @contextlib.contextmanager
    def context():
        if shown and sys.stderr.isatty():
            from tqdm.auto import tqdm

            with tqdm(total=total, desc=title, dynamic_ncols=True) as bar:
                yield bar.update
            return
        start = time.monotonic()
        yield lambda count: None
        say(f"{title}: {total} items in {time.monotonic() - start:.0f} s")

    return context()


# ------------------------------------------------------------------------------------- prepare


def prepare(settings: Settings, to_train: bool = True) -> Run:
    """Check every input, the quick ones first, load the model and tokenise the data.

    Without `to_train` all rows of a task may be held out, and the model gets no adapters.
    """
    require_packages()
    try:
        expression = settings.options.loss
        loss = None if expression is None else segloss.parse_loss(expression)
    except ValueError as error:
        raise UserError(f"--loss: {error}") from None
    options, training = settings.options, settings.training
    if not settings.model.model_name_or_path:
        raise UserError("there is no model: give --model, a folder, a hub id or a GGUF file")
    import torch
    import trl
    from accelerate import PartialState
    from datasets import Dataset

    from . import data as of_data
    from . import evaluation, model
    from .trainer import Trainer

    PartialState()  # of the backend that the arguments say
    if not sys.stderr.isatty():  # progress is lines there
        model.no_bars()
    name = settings.model.model_name_or_path
    of_data.say(f"loading {name}")
    network, tokenizer = model.load(name, **model_options(settings))
    teacher = teacher_of(settings, loss, tokenizer)
    data = of_data.load(settings, bool(tokenizer.chat_template), to_train)
    check_columns(settings, data)
    check_teacher(settings, data, loss, teacher)
    steps = training.max_steps if training.max_steps > 0 else None
    if steps is None and len(data.tasks):
        batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
        batch *= training.world_size
        steps = math.ceil(math.ceil(len(data.train) / batch) * training.num_train_epochs)
    parts = {"held_out": data.held_out, "validation": data.validation}
    evaluated = {name: Dataset.from_list(rows) for name, rows in parts.items() if rows}
    train = data.train
    if training.packing:  # which keeps only tokens
        training.eval_packing = False
        train = train.remove_columns(["task_ids"] if data.tasks else [])
    if training.eval_strategy != "no" and not evaluated:
        raise UserError(
            f"eval_strategy is {training.eval_strategy} and nothing is held out: --eval_items or "
            "--validation_items N, or data with a test split"
        )
    training.model_init_kwargs = None
    try:
        with warnings.catch_warnings(), model.quiet():
            # names that transformers lets go and TRL and peft still use
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings")
            trainer = Trainer(
                model=network,
                args=training,
                train_dataset=train if to_train else evaluated["held_out"],
                eval_dataset=evaluated or None,
                processing_class=tokenizer,
                peft_config=trl.get_peft_config(settings.model) if to_train else None,
                callbacks=callbacks(options),
                loss=loss,
                teacher=teacher,
                teacher_rest=options.teacher_rest,
                head=options.head,
                task_weights=coba(options, len(data.tasks), steps or 0, training.device),
                sample_weights=sample_weighting(options),
            )
    except (ValueError, RuntimeError, TypeError, NotImplementedError) as error:
        raise UserError(first_line(error)) from None
    prepared = trainer.eval_dataset or {}
    trainer.validation = list(prepared.get("validation", ()))
    trainer.eval_dataset = prepared.get("validation", prepared.get("held_out"))
    check_lengths(trainer, prepared, settings, data)
    held_out = evaluation.items_of(list(prepared.get("held_out", ())), data, trainer)
    if trainer.is_fsdp_enabled or getattr(trainer, "is_deepspeed_enabled", False):
        of_data.say("the table is left out: FSDP and DeepSpeed share the weights out")
        held_out = []
    description = describe(settings, trainer, data, network)
    gguf = model.located(name)[1] is not None
    torch.manual_seed(training.seed)
    return Run(settings, trainer, data, held_out, description, name, gguf)


def teacher_of(settings: Settings, loss: Any, tokenizer: Any) -> Any:
    """The model that the loss learns from, None where none is given."""
    from . import data as of_data
    from . import model

    name = settings.options.teacher
    if name is None:
        return None
    if loss is None or not loss.reads_teacher:
        raise UserError("--teacher is read by distill alone: give --loss 0.5*ce+0.5*distill")
    of_data.say(f"loading the teacher {name}")
    options = {k: v for k, v in model_options(settings).items() if k != "revision"}
    teacher, own = model.load(name, **options)
    if own.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"the tokenizer of the teacher {name} has other tokens than the model's; distill "
            "compares probabilities token by token and takes a teacher of the same vocabulary"
        )
    return teacher


def model_options(settings: Settings) -> dict[str, Any]:
    """What `from_pretrained` is told, as `trl sft` does."""
    import torch
    import trl

    model, training = settings.model, settings.training
    found: dict[str, Any] = dict(training.model_init_kwargs or {})
    found.setdefault("revision", model.model_revision)
    found.setdefault("trust_remote_code", training.trust_remote_code)
    dtype = found.pop("dtype", model.dtype) or "float32"
    found["dtype"] = dtype if dtype == "auto" else getattr(torch, str(dtype))
    if model.attn_implementation:
        found.setdefault("attn_implementation", model.attn_implementation)
    if model.load_in_4bit or model.load_in_8bit:
        from .model import require

        require("bitsandbytes", "--load_in_4bit and --load_in_8bit")
        found["quantization"] = trl.get_quantization_config(model)
    return found


def check_columns(settings: Settings, data: Data) -> None:
    """What an option would lose or has nothing to work on is refused by name."""
    options, training = settings.options, settings.training
    weighs = [f"the column {name}" for name in data.columns]
    weighs += ["--task_weights coba"] if options.task_weights != "none" else []
    if training.packing and weighs:
        raise UserError(f"packing keeps only the tokens, and would lose {' and '.join(weighs)}")
    if options.task_weights == "coba" and len(data.tasks) < 2:
        raise UserError("--task_weights coba weighs tasks against each other; there is only 1")
    if options.task_weights == "coba" and not data.validation:
        raise UserError("--validation_items is 0; --task_weights coba reads their loss")


def check_teacher(settings: Settings, data: Data, loss: Any, teacher: Any) -> None:
    """A loss with distill has one teacher: a model, or the columns of a stored one."""
    from .data import STORED, say

    stored = [name for name in data.columns if name in STORED]
    reads = loss is not None and loss.reads_teacher
    if stored and not reads:
        say(f"note: {' and '.join(stored)} are read by distill alone, which --loss does not have")
    if stored and teacher is not None:
        raise UserError(f"--teacher is given, and the data have {stored[0]}; it takes one of them")
    known = not data.tasks or stored  # what a stream holds is seen when it comes
    if reads and teacher is None and not known:
        raise UserError(
            "--loss has distill, which learns from a teacher: give --teacher MODEL, or data with "
            "the columns teacher_ids and teacher_log_prob"
        )
    watched = data.validation or data.held_out
    if reads and stored and settings.training.eval_strategy != "no":
        for row in watched:
            if STORED[0] not in row:
                raise UserError(
                    f"{row['where']}: there is no teacher_ids, which the loss of --eval_strategy "
                    f"{settings.training.eval_strategy} reads"
                )


def callbacks(options: Any) -> list:
    from transformers import EarlyStoppingCallback

    return [EarlyStoppingCallback(options.patience)] if options.patience else []


def coba(options: Any, num_tasks: int, steps: int, device: Any) -> Any:
    if options.task_weights == "none":
        return None
    warmup = options.coba_warmup or max(2, steps // 10)
    return segloss.CoBa(
        num_tasks,
        warmup=warmup,
        history=options.coba_history or 4 * warmup,
        tau=options.coba_tau,
        mode=options.coba_mode,
        divergence_window=steps + 1,
        device=device,
    )


def sample_weighting(options: Any) -> Any:
    if options.sample_weights == "none":
        return None
    return segloss.SampleWeighting(
        *(options.sample_weights, options.sample_temperature, options.sample_burn_in),
        fraction=options.sample_fraction,
        band=options.sample_band,
    )


def check_tokens(rows: Any, model: Any) -> None:
    """Tokens that the data give themselves are the model's."""
    number = model.get_input_embeddings().num_embeddings
    for name in {"input_ids", "labels"} & set(rows.column_names):
        for place, ids in enumerate(rows[name]):
            if max(ids, default=0) >= number:
                where = rows[place].get("where", "a row")
                raise UserError(
                    f"{where}: {name} has the token {max(ids)}; the model has {number}, from 0 up"
                )


def check_lengths(trainer: Trainer, prepared: dict, settings: Settings, data: Data) -> None:
    """Rows that were cut or left out are counted; columns per token must be as many as tokens."""
    from .data import PER_TOKEN, STORED, say
    from .evaluation import SLACK_TOKENS

    limit, parts = settings.training.max_length, {"train": trainer.train_dataset, **prepared}
    positions = getattr(trainer.model.config.get_text_config(), "max_position_embeddings", None)
    longest = 0
    for name, rows in parts.items():
        if not hasattr(rows, "__len__"):
            return
        check_tokens(rows, trainer.model)
        lengths = [len(ids) for ids in rows["input_ids"]]
        longest = max([longest, *lengths])
        cut = sum(length == limit for length in lengths)
        left_out = sum(count[name] for count in data.counts.values()) - len(lengths)
        if left_out > 0 and (name != "train" or not settings.training.packing):
            say(f"{name}: {left_out} rows are left out: no answer fits into --max_length {limit}")
        if cut and not settings.training.packing:
            say(f"{name}: {cut} of {len(lengths)} rows reach --max_length {limit} and may be cut")
        for column in (name for name in PER_TOKEN if name in rows.column_names):
            found = rows[column]
            for place, (length, numbers) in enumerate(zip(lengths, found, strict=True)):
                count = 0 if numbers is None else len(numbers)
                if numbers is not None and count != length and not length == limit < count:
                    raise UserError(
                        f"{rows[place]['where']}: it has {count} {column} for {length} tokens"
                    )
    trainer.train_dataset = as_long(trainer.train_dataset, settings)
    trainer.eval_dataset = as_long(trainer.eval_dataset, settings)
    if trainer.loss.reads_teacher and STORED[0] in trainer.train_dataset.column_names:
        check_stored(trainer)
    if positions is not None and longest + SLACK_TOKENS > positions:
        raise UserError(
            f"{settings.model.model_name_or_path} reads at most {positions} tokens, and the "
            f"longest row with an answer needs {longest + SLACK_TOKENS}; lower --max_length"
        )


def as_long(rows: Any, settings: Settings) -> Any:
    """A data set whose columns per token are cut as its tokens were."""
    from .data import PER_TOKEN

    found = getattr(rows, "column_names", None) or ()
    names = [name for name in PER_TOKEN if name in found]
    if not names:
        return rows
    at_end = settings.training.truncation_mode == "keep_end"

    def cut(row: dict[str, Any]) -> dict[str, Any]:
        length = len(row["input_ids"])
        part = slice(-length, None) if at_end else slice(length)
        return {name: None if row[name] is None else row[name][part] for name in names}

    return rows.map(cut)


def check_stored(trainer: Trainer) -> None:
    """Every label has a class of the stored teacher, and the student has that class."""
    rows = trainer.train_dataset
    classes = trainer.model.get_output_embeddings().weight.shape[0]
    for place, (labels, lists) in enumerate(zip(rows["labels"], rows["teacher_ids"], strict=True)):
        for label, listed in zip(labels[1:], lists[1:], strict=True):
            if label != -100 and max(listed, default=-1) < 0:
                raise UserError(f"{rows[place]['where']}: teacher_ids has no class for some label")
            if max(listed, default=-1) >= classes:
                raise UserError(
                    f"{rows[place]['where']}: teacher_ids has {max(listed)}; the model has "
                    f"{classes} classes"
                )


def describe(settings: Settings, trainer: Trainer, data: Data, network: Any) -> dict[str, Any]:
    import torch

    names = ("torch", "transformers", "trl", "datasets", "accelerate", "numpy")
    versions = {"python": platform.python_version(), "segloss": segloss.__version__}
    return {
        "given": settings.given,
        "device": str(trainer.args.device),
        "processes": trainer.accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "versions": versions | {name: importlib.metadata.version(name) for name in names},
        "data": data.counts,
        "tasks": data.tasks,
        "fingerprints": {
            "data": data_hash(trainer),
            "model": model_hash(network),
            **({} if trainer.teacher is None else {"teacher": model_hash(trainer.teacher)}),
        },
    }


def data_hash(trainer: Trainer) -> str:
    """Of up to some thousand rows' tokens, in order."""
    digest = hashlib.sha256()
    for rows in (trainer.train_dataset, trainer.eval_dataset):
        if hasattr(rows, "__len__"):
            for place in range(0, len(rows), max(1, len(rows) // 4096)):
                row = rows[place]
                read = [row["input_ids"], row.get("labels")]
                read += [row["teacher_log_prob"]] if "teacher_log_prob" in row else []
                digest.update(json.dumps(read).encode())
    return digest.hexdigest()


def model_hash(network: Any) -> str:
    """Of the beginning of every weight: enough to tell models apart, without reading them all."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        if "lora_" not in name:
            digest.update(str(tuple(value.shape)).encode())
            digest.update(value.flatten()[:1024].float().cpu().numpy().tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------- commands


def stored(path: str) -> dict[str, Any]:
    """The settings that a run's folder says it was given. Raises `UserError` without one."""
    file = Path(path) / SETTINGS
    if not os.path.isdir(path):
        raise UserError(f"{path}: no such folder")
    if not file.is_file():
        raise UserError(f"{path}: there is no {SETTINGS} in it, so it is no run's folder")
    try:
        return json.loads(file.read_text(encoding="utf-8"))["given"] | {"output_dir": path}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} is not what a run writes") from None


def evaluate(settings: Settings, json_path: str = "") -> None:
    """Print the table of a model on the held-out rows; nothing is trained."""
    from . import report

    if json_path and os.path.lexists(json_path):
        raise UserError(f"--json {json_path} exists already; remove it or give another name")
    run = prepare(settings, to_train=False)
    found = {"tasks": run.evaluate("evaluating", {}), "before": None, "model": run.model_name}
    record = report.Record.of(Path(run.model_name), run.description, found)
    print(f"\n{report.markdown([record])}")
    if json_path:
        try:
            write(Path(json_path), found)
        except OSError as error:
            raise UserError(f"cannot write {json_path}: {error.strerror}") from None

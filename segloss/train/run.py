"""One fine-tuning run, from the settings or from a checkpoint to the results."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import time
import warnings
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import datasets
import torch
import trl
from accelerate.utils import broadcast_object_list
from filelock import FileLock
from transformers import EarlyStoppingCallback

import segloss
from segloss.doctor import environment
from segloss.integrations.transformers import CoBaCallback

from . import data as of_data
from . import evaluation, report
from . import model as of_model
from .config import Settings
from .data import STORED, Data, say
from .errors import UserError, first_line
from .report import SETTINGS, read_json, write
from .trainer import Trainer, last_whole

TRAINED, BEFORE, TABLE = "trained.json", "before.json", "results.md"
# room in the time limit for what is written, and for evaluation after training being slower
SPARE_SECONDS, SPARE_FACTOR = 10.0, 1.2


def train(settings: Settings, resumed: bool = False) -> None:
    """Fine-tune, evaluate, write the output folder and print the table.

    The order is such that nothing finished is lost: every input is checked before the folder is
    made, and what is finished is on disk before the next thing begins. `resumed`: go on with the
    run that is in the folder, from its last whole checkpoint or its beginning; on a CPU it ends in
    the same bits as it would have.
    """
    output = Path(settings.training.output_dir)
    if not resumed:
        require_new(settings)
    elif all((output / name).exists() for name in (report.RESULTS, TRAINED)):
        raise UserError(f"--resume {output}: the run is finished, its results are in {TABLE}")
    run = Run(settings, resumed=resumed)
    run.open()
    lock = FileLock(f"{run.output / report.METRICS}.lock", timeout=0)
    with lock if run.trainer.args.should_save else contextlib.nullcontext():
        run.after(run.before(), run.fit())


def require_new(settings: Settings) -> None:
    """Have a folder that is no run's yet: a new one, unless it is given, on every process."""
    training = settings.training
    if "output_dir" not in settings.given:
        training.output_dir = broadcast_object_list([time.strftime("runs/%Y%m%d-%H%M%S")])[0]
    output = Path(training.output_dir)
    held = (output / SETTINGS).exists() or (output.exists() and not output.is_dir())
    if held and not training.resume_from_checkpoint:
        raise UserError(
            f"{output} holds a run already: segloss train --resume {output} goes on with it, "
            "another --output_dir begins anew"
        )


class Run:
    """A trainer with its data, and what becomes of them."""

    def __init__(self, settings: Settings, to_train: bool = True, resumed: bool = False):
        """Check every input, the quick ones first, load the model and tokenise the data.

        Without `to_train` all rows of a task may be held out, and the model gets no adapters.
        """
        self.settings, self.resumed, self.start = settings, resumed, time.monotonic()
        options, training = settings.options, settings.training
        try:
            loss = None if options.loss is None else segloss.parse_loss(options.loss)
        except ValueError as error:
            raise UserError(f"--loss: {error}") from None
        name = settings.model.model_name_or_path
        if not name:
            raise UserError("there is no model: give --model, a folder, a hub id or a GGUF file")
        model, tokenizer = loaded(settings, name)
        self.data = data = of_data.load(settings, bool(tokenizer.chat_template), to_train)
        parts = {"held_out": data.held_out, "validation": data.validation}
        evaluated = {name: datasets.Dataset.from_list(rows) for name, rows in parts.items() if rows}
        refuse(settings, data, loss, to_train)
        teacher = None
        if options.teacher is not None:
            teacher, own = loaded(settings, options.teacher, revision="main")
            if own.get_vocab() != tokenizer.get_vocab():
                raise UserError(
                    f"the tokenizer of the teacher {options.teacher} has other tokens than the "
                    "model's; distill takes a teacher of the same vocabulary"
                )
        samples = None if options.sample_weights == "none" else segloss.SampleWeighting(
            options.sample_weights, options.sample_temperature, options.sample_burn_in,
            fraction=options.sample_fraction, band=options.sample_band,
        )  # fmt: skip
        training.eval_packing = False  # packing keeps only tokens
        training.model_init_kwargs = None
        # names that transformers lets go and TRL and peft still use; peft's notes on saving a head
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", ".*tie_word|Setting `save_emb|Could not find a config")
        try:
            self.trainer = trainer = Trainer(
                model=model, args=training, processing_class=tokenizer,
                train_dataset=data.train if to_train else evaluated["held_out"],
                eval_dataset=evaluated or None,
                peft_config=trl.get_peft_config(settings.model) if to_train else None,
                callbacks=[EarlyStoppingCallback(options.patience)] if options.patience else [],
                loss=loss, teacher=teacher, teacher_rest=options.teacher_rest, head=options.head,
                sample_weights=samples,
            )  # fmt: skip
        except (ValueError, RuntimeError, TypeError, OSError) as error:
            raise UserError(first_line(error)) from None
        given = {"train": data.train, **evaluated} if to_train else evaluated
        prepared = of_data.fitted(trainer, settings, given)
        trainer.train_dataset = prepared["train"]
        trainer.eval_dataset = prepared.get("validation", prepared.get("held_out"))
        trainer.tasks = data.tasks
        if data.validation:
            kept = ["task", "task_ids", "input_ids", "labels"]
            trainer.validation = list(prepared["validation"].select_columns(kept))
        if options.task_weights == "coba":
            trainer.coba = coba_of(trainer, options, len(data.train))
            trainer.task_weights = trainer.coba.coba
            trainer.add_callback(trainer.coba)
        held_out = prepared.get("held_out", ())
        if trainer.is_fsdp_enabled or getattr(trainer, "is_deepspeed_enabled", False):
            say(
                "the table is left out, since FSDP and DeepSpeed share the weights out: segloss "
                f"evaluate {training.output_dir} makes it afterwards"
            )
            held_out = ()
        self.held_out = [evaluation.item_of(row, data, trainer) for row in held_out]
        self.output = Path(training.output_dir)
        self.timing = {"load": time.monotonic() - self.start}

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.timing[name] = time.monotonic() - start

    def open(self) -> None:
        """Say in the folder what is run, or see that it is this run's."""
        now = described(self.settings, self.trainer, self.data)
        if not self.resumed and not self.save(SETTINGS, now):
            raise UserError(f"cannot write to {self.output}: {self.trainer.failures[SETTINGS]}")
        then = read_json(self.output / SETTINGS) if self.resumed else now
        for what, value in then.get("fingerprints", {}).items():
            if value != now["fingerprints"][what]:
                raise UserError(f"--resume {self.output}: the {what} changed since it began")
        for name, value in now["versions"].items():
            if value != (was := then.get("versions", {}).get(name)):
                say(f"note: {name} was {was}, is {value}: the last bits may differ")

    def before(self) -> list[dict] | None:
        """The results before training, from the file that an interrupted run has left."""
        if not self.settings.options.evaluate_before or not self.held_out:
            return None
        title, found = "evaluating before", read_json(self.output / BEFORE) if self.resumed else {}
        if not found:
            found = {"tasks": self.evaluate(title), "seconds": self.timing[title]}
            self.save(BEFORE, found)
        self.timing[title] = found["seconds"]
        return found["tasks"]

    def evaluate(self, title: str) -> list[dict]:
        """One row of scores per task; beside them the answers, in answers-TITLE.jsonl."""
        options = self.settings.options
        with self.timed(title):
            found = evaluation.evaluate(self.trainer, self.held_out, title, options.exact_match)
        say(f"{title}: {len(self.held_out)} items in {self.timing[title]:.0f} s")
        self.save(f"answers-{title.rpartition(' ')[2]}.jsonl", report.json_lines(found))
        return evaluation.results(self.held_out, self.data, options, self.trainer.args.seed)

    def fit(self) -> dict[str, Any]:
        """Train, and leave the model in the folder; how many steps, and what ended it early."""
        trainer, limit = self.trainer, self.settings.options.time_limit
        found = read_json(self.output / TRAINED) if self.resumed else {}
        if found:
            trainer._load_from_checkpoint(str(self.output))
            self.timing["training"] = found["seconds"]
            return found
        checkpoint = self.settings.training.resume_from_checkpoint
        if self.resumed or str(checkpoint).lower() == "true":
            checkpoint = last_whole(self.output, trainer.args.should_save)
        reserve = SPARE_SECONDS + SPARE_FACTOR * self.timing.get("evaluating before", 0.0)
        trainer.deadline = self.start + limit - reserve if limit else math.inf
        trainer.metrics = self.output / report.METRICS if trainer.args.should_save else None
        with self.timed("training"):
            trainer.train(checkpoint or None)
        steps = trainer.state.global_step
        stopped = trainer.stopped or ("patience" if steps < trainer.state.max_steps else "")
        if stopped == "interrupt" and trainer.failures:
            failed = "; ".join(trainer.failures.values())
            raise UserError(f"interrupted, and could not write {failed}")
        if stopped == "interrupt":
            raise KeyboardInterrupt(
                f"interrupted after step {steps}, saved in {self.output}/checkpoint-{steps}: "
                f"segloss train --resume {self.output} goes on from there"
            )
        found = {"steps": steps, "stopped": stopped, "seconds": self.timing["training"]}
        if self.leave_model():
            self.save(TRAINED, found)
        return found

    def leave_model(self) -> bool:
        """The model, or its adapter, with the tokenizer, as `from_pretrained` reads them."""
        trainer, merge = self.trainer, self.settings.options.merge
        written = trainer.attempt("the model", trainer.save_model)
        if merge is None:
            merge = of_model.located(self.settings.model.model_name_or_path)[1] is not None
        if merge and hasattr(trainer.model, "merge_and_unload") and trainer.args.should_save:
            written &= trainer.attempt("merged", self._merge)
        return written

    def _merge(self) -> None:
        """The adapters' products added to the weights, in a copy that training does not see."""
        model = copy.deepcopy(self.trainer.model).cpu()
        base = model.get_base_model()
        head = base.get_output_embeddings()
        if hasattr(head, "lora_A") and head.base_layer.weight is base.get_input_embeddings().weight:
            # an adapter on a shared weight would change the embeddings as well
            head.base_layer.weight = torch.nn.Parameter(head.base_layer.weight.detach().clone())
            base.config.tie_word_embeddings = False
            base.all_tied_weights_keys = {}  # what saving leaves out
        for part in (model.merge_and_unload(), self.trainer.processing_class):
            part.save_pretrained(self.output / "merged")

    def after(self, before: list[dict] | None, trained: dict[str, Any]) -> None:
        """Evaluate, write the results, and print them."""
        tasks = self.evaluate("evaluating after") if self.held_out else []
        timing = self.timing | {"total": time.monotonic() - self.start}
        found = {
            "tasks": tasks, "before": before,
            "steps": trained["steps"], "stopped": trained["stopped"],
            "timing": {name: round(seconds, 1) for name, seconds in timing.items()},
            "examples_per_step": self.trainer.get_total_train_batch_size(self.trainer.args),
        }  # fmt: skip
        self.save(report.RESULTS, found)
        record = report.Record(self.output.name, {"given": self.settings.given}, results=found)
        self.finish(f"{report.summary([record])}\n\n{report.story(record)}\n")

    def finish(self, text: str) -> None:
        """Write and print what came out; raises `UserError` of what could not be written."""
        self.save(TABLE, text)
        if self.trainer.is_world_process_zero():
            print(f"\n{text}\n{self.output}", flush=True)
        if self.trainer.args.push_to_hub:
            self.trainer.push_to_hub(dataset_name=self.settings.script.dataset_name)
        if self.trainer.failures:
            failed = "; ".join(self.trainer.failures.values())
            raise UserError(f"could not write to {self.output}: {failed}")

    def save(self, name: str, value: Any) -> bool:
        """Write a file of the folder, on the first process; whether it could."""
        trainer, file = self.trainer, self.output / name
        return not trainer.args.should_save or trainer.attempt(name, write, file, value)


def loaded(settings: Settings, name: str, **own: Any) -> tuple[Any, Any]:
    """A model and its tokenizer, read as `trl sft` does."""
    model, training = settings.model, settings.training
    say(f"loading {name}")
    options = {
        "revision": model.model_revision, "trust_remote_code": training.trust_remote_code,
        "dtype": model.dtype, "attn_implementation": model.attn_implementation,
        "quantization_config": trl.get_quantization_config(model),
        **(training.model_init_kwargs or {}), **own,
    }  # fmt: skip
    return of_model.load(name, **{k: v for k, v in options.items() if v is not None})


def refuse(settings: Settings, data: Data, loss: Any, to_train: bool) -> None:
    """What an option would lose or has nothing to work on is refused by name."""
    options, training = settings.options, settings.training
    watched, evaluates = data.validation or data.held_out, training.eval_strategy != "no"
    coba = options.task_weights == "coba"
    stored = [name for name in STORED if name in (data.train.column_names or ())]
    reads = loss is not None and loss.reads_teacher
    blind = [row for row in watched if stored and STORED[0] not in row]
    if stored and not reads:
        say(f"note: {' and '.join(stored)} are read by distill alone, which --loss does not have")
    refusals = {
        "packing keeps only the tokens, and would lose --task_weights coba":
            training.packing and coba,
        "--use_liger_kernel and --activation_offloading take a GPU; use_cpu is on":
            training.use_cpu and (training.use_liger_kernel or training.activation_offloading),
        "--task_weights coba weighs tasks against each other; there is only 1":
            coba and len(data.tasks) < 2,
        "--validation_items is 0; --task_weights coba reads their loss":
            coba and not data.validation,
        f"eval_strategy is {training.eval_strategy} and nothing is held out: --eval_items or "
        "--validation_items N, or data with a test split":
            evaluates and not watched,
        "--teacher is read by distill alone: give --loss 0.5*ce+0.5*distill":
            options.teacher and not reads,
        f"{blind[0]['where'] if blind else ''}: there is no teacher_ids, which the loss of "
        f"--eval_strategy {training.eval_strategy} reads":
            reads and evaluates and blind,
        "no items are held out, so there is nothing to evaluate (--eval_items)":
            not to_train and not data.held_out,
    }  # fmt: skip
    for message, refused in refusals.items():
        if refused:
            raise UserError(message)


def coba_of(trainer: Any, options: Any, rows: int) -> CoBaCallback:
    """CoBa, told the tasks' losses on so many validation items of each in turn."""
    args, count, number = trainer.args, options.validation_batch, len(trainer.tasks)
    epoch = math.ceil(rows / trainer.get_total_train_batch_size(args))
    steps = max(args.max_steps, 0) or math.ceil(epoch * args.num_train_epochs)
    warmup = options.coba_warmup or max(2, steps // 10)
    coba = segloss.CoBa(
        number, warmup=warmup, history=options.coba_history or 4 * warmup, tau=options.coba_tau,
        mode=options.coba_mode, divergence_window=steps + 1, device=args.device,
    )  # fmt: skip
    tasks = [[row for row in trainer.validation if row["task_ids"] == n] for n in range(number)]
    batches = [
        trainer.data_collator([row for rows in tasks for row in rows[i : i + count]])
        for i in range(0, max(map(len, tasks)), count)
    ]
    return CoBaCallback(coba, batches, head=trainer.head)


def described(settings: Settings, trainer: Trainer, data: Data) -> dict[str, Any]:
    """Enough to do the run again, and to tell its data and models from others."""
    columns = ("input_ids", "labels", "teacher_log_prob")
    sets = [s for s in (trainer.train_dataset, trainer.eval_dataset) if hasattr(s, "__len__")]
    rows = (s[i] for s in sets for i in range(0, len(s), max(1, len(s) // 4096)))
    read: dict[str, Any] = {"data": [[row.get(name) for name in columns] for row in rows]}
    for what, model in {"model": trainer.model, "teacher": trainer.teacher}.items():
        weights = model.state_dict() if model is not None else {}
        own = [w for name, w in weights.items() if "lora_" not in name]
        read[what] = [(tuple(w.shape), w.flatten()[:1024].float().tolist()) for w in own]
    here = {"trained on": str(trainer.args.device), "processes": trainer.args.world_size}
    return {
        "given": settings.given, "data": data.counts, "tasks": data.tasks,
        "versions": environment() | here,
        "fingerprints": {k: sha256(json.dumps(v).encode()).hexdigest() for k, v in read.items()},
    }  # fmt: skip


def stored(path: str) -> dict[str, Any]:
    """The settings of a run that trains, from its folder."""
    (record,) = report.read_records([path])
    given = record.description["given"]
    if record.selection or "target" in given:
        raise UserError(f"{path} is a run of segloss select, which leaves no model")
    return given | {"output_dir": path}


def evaluated(target: str, told: dict[str, Any]) -> dict[str, Any]:
    """Of a run its settings with its model, but for those that are told; or a model's name."""
    folder = Path(target)
    if not (folder / SETTINGS).is_file():
        return {"model_name_or_path": target}
    past = stored(target)
    if not (folder / TRAINED).is_file():
        raise UserError(f"{target} has no model yet; segloss train --resume goes on with it")
    merged = folder / "merged"
    past["model_name_or_path"] = str(merged if merged.is_dir() else target)
    unread = {"task_weights", "fsdp", "fsdp_config", "deepspeed"}  # of training, of processes
    if told.keys() & {"data", "dataset_name"}:  # other rows than the run's
        unread |= {"data", "dataset_name", "datasets", "tasks"}
    return {name: value for name, value in past.items() if name not in unread}


def evaluate(settings: Settings) -> None:
    """Print the table of a model on the held-out rows; nothing is trained."""
    file, name = settings.options.json, settings.model.model_name_or_path
    if file and Path(file).exists():
        raise UserError(f"--json {file} exists already; remove it or give another name")
    run = Run(settings, to_train=False)
    found = {"tasks": run.evaluate("evaluating"), "before": None, "model": name}
    print(f"\n{report.summary([report.Record(name, {}, results=found)])}")
    if file and not run.save(os.path.abspath(file), found):
        raise UserError(f"cannot write {'; '.join(run.trainer.failures.values())}")

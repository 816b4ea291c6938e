"""What each process of test_ranks.py trains; importable, because processes are spawned."""

from __future__ import annotations

import tempfile
import warnings

from integration_helpers import (
    TASK_WEIGHTS,
    coba,
    tiny_model,
    tiny_rows,
    validation_batches,
    watch,
)

import segloss

TEMPERATURE = 0.05
# micro-batches of a step on each rank
ACCUMULATION = (1, 2)
# losses that are the same however many processes hold the tokens of a micro-batch
ALIKE = {
    "cross-entropy": segloss.CrossEntropyLoss(),
    "dice": segloss.DiceLoss(),
    "dice of samples": segloss.DiceLoss(per_sample=True),
    "0.6 ce + 0.4 lovasz": 0.6 * segloss.CrossEntropyLoss() + 0.4 * segloss.LovaszSoftmaxLoss(),
}


def results(rank: int, group) -> dict:
    """Of each case: [(loss, gradients)] of every step, and what was logged."""
    from transformers.trainer_utils import set_seed

    found = {}
    for name, accumulation, options in cases(group):
        set_seed(0)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the libraries
            ours = trainer(name, folder, accumulation, **options)
            steps = watch(ours)
            logs = list(ours.state.log_history)
            if name in ALIKE:
                logs.append(ours.evaluate(tiny_rows()[:5]))
            found[name, accumulation] = steps, logs
    return found


def cases(group):
    def sample_weights():
        return segloss.SampleWeighting("irdro", temperature=TEMPERATURE, group=group)

    for accumulation in ACCUMULATION:
        yield "focal", accumulation, {"loss": segloss.FocalLoss()}
        yield "sample weights", accumulation, {"sample_weights": sample_weights()}
        yield "task weights", accumulation, {"task_weights": TASK_WEIGHTS}
        balancer = coba(group)
        both = {"task_weights": balancer, "sample_weights": sample_weights()}
        yield "coba and sample weights", accumulation, both | {"coba": balancer}
        yield "column of weights", accumulation, {"rows": weighted_rows()}
        yield "trl", accumulation, {"loss": segloss.FocalLoss()}
        yield "compute_loss_func", accumulation, {}
        yield "fuse_loss", accumulation, {}
        yield "own group", accumulation, {"loss": segloss.DiceLoss(group=group)}
        for name, loss in ALIKE.items():
            yield name, accumulation, {"loss": loss}


def weighted_rows():
    return [row | {"sample_weights": 0.25 + i} for i, row in enumerate(tiny_rows())]


def trainer(name, folder, accumulation, coba=None, **options):
    import transformers
    from integrations import test_trainer, test_trl

    from segloss.integrations.transformers import CoBaCallback, compute_loss_func, fuse_loss

    if name == "compute_loss_func":
        options["trainer_class"] = transformers.Trainer
        options["compute_loss_func"] = compute_loss_func(segloss.FocalLoss())
        options["rows"] = test_trainer.without_tasks()
    if name == "fuse_loss":
        options["trainer_class"] = transformers.Trainer
        options["rows"] = test_trainer.without_tasks()
        options["model"] = tiny_model()
        fuse_loss(options["model"], segloss.FocalLoss())
    make = test_trl.trainer if name == "trl" else test_trainer.trainer
    ours = make(folder, accumulation=accumulation, **options)
    if coba is not None:
        ours.add_callback(CoBaCallback(coba, validation_batches()))
    return ours

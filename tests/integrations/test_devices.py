"""A device without float64, such as MPS, played by the CPU."""

import contextlib
import sys

import pytest
import torch
from integration_helpers import coba, tiny_model, validation_batches, watch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import segloss
from segloss.kernels import common

pytest.importorskip("transformers")
from integrations.test_trainer import trainer

from segloss.integrations.transformers import CoBaCallback
from segloss.models import head

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")


class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64:
                raise TypeError(f"{function.__name__} makes float64, which the device has not")
        return result


@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_without_float64(accumulation, tmp_path, monkeypatch):
    """Both kinds of weights, CoBa's measurements and what is logged, as with float64."""

    # what a model does to its logits is learnt on the CPU, in float64
    monkeypatch.setattr(head, "learn", lambda *given: head.Transform())
    monkeypatch.setattr(head, "is_due", lambda *given: False)

    def run(mode):
        balancer, weighting = coba(), segloss.SampleWeighting("irdro", temperature=0.05)
        options = {"task_weights": balancer, "sample_weights": weighting}
        ours = trainer(tmp_path, tiny_model().float(), accumulation, **options)
        ours.add_callback(CoBaCallback(balancer, validation_batches()))
        with mode:
            return watch(ours), ours.state.log_history[:2]

    expected, expected_logs = run(contextlib.nullcontext())
    widest = common.widest
    for name, module in list(sys.modules.items()):
        if name.startswith("segloss.") and getattr(module, "widest", None) is widest:
            monkeypatch.setattr(module, "widest", lambda device: torch.float32)
    found, logs = run(NoFloat64())
    for (value, grad), (other, expected_grad) in zip(found, expected, strict=True):
        assert value == pytest.approx(other, rel=1e-5)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5)
    for name in ("entropy", "mean_token_accuracy", "task_weight_0", "effective_sample_size"):
        for line, other in zip(logs, expected_logs, strict=True):
            assert line[name] == pytest.approx(other[name], rel=1e-4)

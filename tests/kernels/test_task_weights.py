"""CoBa's kernel against its twin: the same rings and the same weights after every update."""

from dataclasses import fields

import pytest
import torch
from kernel_helpers import on

from segloss.kernels.task_weights import Moment, TaskHistory, task_weights

# K: a lone task; 3 make 4 columns, a power of two, 4 make 5, one more; 200 leave tiles of 2 rows.
# N: the least, within a tile, and several tiles. G: within a block of 512 and, wrapped, above it.
SHAPES = [(1, 2, 3), (3, 7, 600), (4, 150, 1), (200, 5, 20)]
every_shape = pytest.mark.parametrize("k, n, g", SHAPES)
both_modes = pytest.mark.parametrize("published", [False, True], ids=["paper", "published"])


def losses_of(k, updates, dtype):
    """Falling and noisy; some missing, one infinite, a constant task, the last one absent."""
    generator = torch.Generator().manual_seed(k)
    t = torch.arange(updates, dtype=torch.float64)[:, None]
    losses = torch.exp(-0.05 * t * torch.rand(k, generator=generator, dtype=torch.float64))
    losses = losses * (1 + 0.1 * torch.rand(losses.shape, generator=generator))
    losses[torch.rand(losses.shape, generator=generator) < 0.3] = torch.nan
    losses[5 % updates, 0] = torch.inf
    if k > 1:
        losses[:, -1] = torch.nan
        losses[losses[:, 1].isfinite(), 1] = 0.7
    return losses.to(dtype)


def compare(history, others, out, other_out):
    for field in fields(TaskHistory):
        ours, theirs = getattr(history, field.name), getattr(others, field.name)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14, equal_nan=True)
    for ours, theirs in zip(out, other_out, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-14, equal_nan=True)


@both_modes
@every_shape
def test_every_shape(k, n, g, published):
    updates, scored = 2 * min(n, 12) + 3, max(1, n - 2)
    histories = [TaskHistory.empty(k, n, scored, g, "cpu") for _ in range(2)]
    for update, losses in enumerate(losses_of(k, updates, torch.float64)):
        moment = Moment(update, 3 * update + update % 2, update >= 4)
        out = [
            on(backend, task_weights, history, losses, moment, tau=5.0, published=published)
            for backend, history in zip(("triton", "torch"), histories, strict=True)
        ]
        compare(*histories, *out)
        for part in out[0][:3]:
            assert abs(float(part.sum()) - 1) < 1e-12
    assert (out[0].weights - 1 / k).abs().max() > 0.01 or k == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_losses_of_every_dtype(dtype):
    histories = [TaskHistory.empty(3, 6, 6, 9, "cpu") for _ in range(2)]
    by_column = losses_of(3, 9, dtype).T.contiguous().T  # each row has gaps in memory
    for update, losses in enumerate(by_column):
        moment = Moment(update, update, update >= 2)
        out = [
            on(backend, task_weights, history, losses, moment, tau=5.0, published=False)
            for backend, history in zip(("triton", "torch"), histories, strict=True)
        ]
        compare(*histories, *out)


@both_modes
def test_a_ring_of_several_blocks(published):
    """1,500 kept slopes are three blocks of the divergence factor's loop."""
    histories = [TaskHistory.empty(2, 4, 4, 1500, "cpu") for _ in range(2)]
    slopes = torch.randn(1500, generator=torch.Generator().manual_seed(0)).double()
    slopes[::7] = torch.nan
    for history in histories:
        history.max_slopes.copy_(slopes)
    for update in range(1600, 1604):
        losses = torch.tensor([1.0 / update, 2.0 / update**2]).double()
        out = [
            on(
                backend,
                task_weights,
                history,
                losses,
                Moment(update, update, True),
                tau=1.5,
                published=published,
            )
            for backend, history in zip(("triton", "torch"), histories, strict=True)
        ]
        compare(*histories, *out)

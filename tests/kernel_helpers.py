"""What the tests of kernels share: rows of every kind, both backends, a guard on memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

from segloss.kernels.common import Rows

# N: none, a lone row, a ragged block, one above a power of two (three slabs of 16 for class sums).
# V: a lone class, the least choice, odd and within a tile, and 3 columns beyond whole tiles.
NUMS = (0, 1, 7, 33)
WIDTHS = (1, 2, 507, 4099)
every_shape = pytest.mark.parametrize("n, v", [(n, v) for n in NUMS for v in WIDTHS])

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

LAYOUTS = ("rows", "shifted", "padded", "transposed", "expanded")
every_layout = pytest.mark.parametrize("layout", LAYOUTS)

# scale and softcap alone compile to different code; neither is a number that float32 holds exactly
TRANSFORMS = {"softcap": {"softcap": 7.3}, "scale": {"scale": 0.3}}
TRANSFORMS["both"] = TRANSFORMS["softcap"] | TRANSFORMS["scale"]
every_transform = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)


# ----------------------------------------------------------------------------------- examples


@dataclass
class Example:
    """Rows as kernels take them, and what they stand for in float64."""

    rows: Rows
    target: Tensor  # (N,), -100 where ignored
    z: Tensor  # (N, V) transformed logits; NaN in ignored rows

    @property
    def valid(self) -> Tensor:
        return self.target != -100

    @property
    def dtype(self) -> torch.dtype:
        return self.rows.dtype

    @property
    def shape(self) -> tuple[int, int]:
        return self.z.shape

    @property
    def row_max(self) -> Tensor:
        row_max = self.z.amax(-1) if self.z.numel() else self.z.new_zeros(self.z.shape[0])
        return row_max.masked_fill(row_max == -torch.inf, 0)

    @property
    def lse(self) -> Tensor:
        return self.row_max + (self.z - self.row_max[:, None]).exp().sum(-1).log()

    @property
    def log_p(self) -> Tensor:
        return self.z - self.lse[:, None]

    def row_sums(self) -> tuple[Tensor, Tensor]:
        """`row_max` and `log_sum` as the row kernel hands them on; NaN where never to be read."""
        row_max = self.row_max
        log_sum = torch.where(self.valid, self.lse - row_max, torch.nan)
        return row_max.to(self.dtype), log_sum.to(self.dtype)


def example(
    n: int,
    v: int,
    dtype: torch.dtype = torch.float32,
    layout: str = "rows",
    *,
    poisoned: bool = False,
    **transform,
) -> Example:
    """Rows with every trouble that fits into the shape.

    Row 0 is confident of the last column, and every other row has its maximum there or close by,
    which for V = 4099 is in the last tile. Row 2 of each 5 is ignored, and holds NaN. Some
    columns are -inf in every row; row 4 is -inf in all but its last two; row 6 has a target of
    logit -inf. `poisoned`: row 3 has one NaN.
    """
    repeats = 3 if layout == "expanded" and n % 3 == 0 else 1
    values, target = random_rows(n // repeats, v, poisoned)
    logits = arranged(values.to(dtype), layout, repeats)
    rows = Rows.of(logits, **transform)
    z = values.to(dtype).double().repeat(repeats, 1) * rows.scale
    if rows.softcap is not None:
        capped = rows.softcap * torch.tanh(z / rows.softcap)
        z = torch.where(z == -torch.inf, z, capped)
    return Example(rows, target.repeat(repeats), z)


def random_rows(n: int, v: int, poisoned: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n * 10007 + v)
    values = 2 * torch.randn(n, v, generator=generator, dtype=torch.float64)
    values[::2, -1] += 8
    values[1::2, -2:] += 4
    if v > 2:
        values[:, [3, v // 2]] = -torch.inf
        values[4:5, :-2] = -torch.inf
    elif v == 2:
        values[5:6, 0] = -torch.inf
    target = torch.zeros(0, dtype=torch.int64)
    if n:
        likely = values.exp() + (values > -torch.inf) * 0.1
        target = torch.multinomial(likely, 1, generator=generator)[:, 0]
    target[:1] = v - 1
    if v > 2:
        target[6:7] = 3
    if poisoned:
        values[3:4, v // 3] = torch.nan
    values[2::5] = torch.nan
    target[2::5] = -100
    return values, target


def arranged(values: Tensor, layout: str, repeats: int) -> Tensor:
    """The same rows in memory as callers have them; what lies between them is NaN."""
    n, v = values.shape
    if layout == "shifted":  # (B, T, V) without the last token of each sample
        batch = 3 if n % 3 == 0 else 1
        longer = values.new_full((batch, n // batch + 1, v), torch.nan)
        longer[:, :-1] = values.view(batch, n // batch, v)
        return longer[:, :-1]
    if layout == "padded":  # a vocabulary rounded up
        wider = values.new_full((n, v + 5), torch.nan)
        wider[:, :v] = values
        return wider[:, :v]
    if layout == "transposed":
        return values.T.contiguous().T
    if layout == "expanded":
        return values.expand(repeats, n, v)
    return values


def samples(ex: Example, num_samples: int) -> Tensor:
    """The row's sample, -1 where ignored; with several of them, the next to last has no row."""
    sample = torch.arange(ex.target.numel()) % num_samples
    sample = torch.where((num_samples > 1) & (sample == num_samples - 2), 0, sample)
    return torch.where(ex.valid, sample, -1)


def some_columns(v: int, k: int) -> Tensor:
    """k of v columns, ascending: the last one, a column of -inf and others."""
    chosen = torch.randperm(v, generator=torch.Generator().manual_seed(k))[: max(0, k - 2)]
    return torch.unique(torch.cat([chosen, torch.tensor([v - 1, min(3, v - 1)])]))


def eighths(*shape: int, seed: int) -> Tensor:
    """Numbers of both signs, exact in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-16, 17, shape, generator=generator).double() / 8


# --------------------------------------------------------------------------------- comparison


def on(backend: str, function: Callable, *args, **options):
    """What `function` returns with every launcher forced to one backend."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEGLOSS_BACKEND", backend)
        return function(*args, **options)


def on_both(function: Callable, *args, **options) -> tuple:
    """(by the Triton kernel, by its torch twin)."""
    return on("triton", function, *args, **options), on("torch", function, *args, **options)


def assert_close(
    actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None, size: float | None = None
) -> None:
    """Equal to rounding, NaN where NaN is due, in a result computed in `dtype`.

    A probability is the exponential of a number of up to 30, whose rounding is 30 times that of a
    number near 1: hence 64 eps, relatively. A sum or a difference is as good as its terms, of up to
    `size` (by default the largest result): hence 8 eps of that, absolutely. A half-precision
    result is in addition rounded once, to one neighbour or the other.
    """
    dtype = dtype or actual.dtype
    stored = torch.finfo(actual.dtype)
    computed = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    actual, expected = actual.double(), expected.double()
    if size is None:
        finite = expected[expected.isfinite()]
        size = float(finite.abs().max()) if finite.numel() else 0.0
    rtol, atol = 64 * computed.eps, 8 * computed.eps * size
    if stored.bits == 16:
        rtol, atol = rtol + stored.eps, atol + stored.smallest_normal * stored.eps
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, equal_nan=True)


# -------------------------------------------------------------------------------------- memory


@dataclass
class Memory:
    """What interpreted kernels touch: their tensors, and of those nothing that is forbidden."""

    launches: int = 0
    spans: list[tuple[int, int]] = field(default_factory=list)  # of the running launch's tensors
    forbidden: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))  # ascending

    def enter(self, tensors: list[Tensor]) -> None:
        self.launches += 1
        self.spans = [span(tensor) for tensor in tensors if tensor.numel()]

    def check(self, pointers, mask) -> None:
        used = pointers.data[mask.data]
        if not used.size:
            return
        low, high = int(used.min()), int(used.max())
        if not any(first <= low and high < last for first, last in self.spans):
            raise IndexError(f"addresses {low} to {high} are in none of {self.spans}")
        before = np.searchsorted(self.forbidden, used, "left")
        if (before < np.searchsorted(self.forbidden, used, "right")).any():
            raise IndexError("what was declared out of bounds is touched")

    def forbid(self, tensor: Tensor) -> None:
        """No kernel may touch an element of `tensor` (any strides) from here on."""
        offsets = torch.zeros((), dtype=torch.int64)
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            offsets = offsets[..., None] + torch.arange(size) * stride
        addresses = (tensor.data_ptr() + offsets.flatten() * tensor.element_size()).numpy()
        self.forbidden = np.union1d(self.forbidden, addresses.astype(np.uint64))

    def forbid_ignored(self, ex: Example) -> None:
        """No kernel may touch the logits of an ignored row."""
        time = ex.rows.data.shape[1]
        for row in (~ex.valid).nonzero()[:, 0].tolist():
            self.forbid(ex.rows.data[row // time, row % time])


def span(tensor: Tensor) -> tuple[int, int]:
    """First address of a tensor, and the address behind its last element."""
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def watch(memory: Memory, patch: pytest.MonkeyPatch) -> None:
    """Makes the interpreter check every access with `memory`."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store = builder.create_masked_load, builder.create_masked_store
    start, prepare_language = executor._init_args_hst, interpreter._patch_lang
    prepared = set()

    def checked_load(self, pointers, mask, *rest, **options):
        memory.check(pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def checked_store(self, pointers, value, mask, *rest, **options):
        memory.check(pointers, mask)
        return store(self, pointers, value, mask, *rest, **options)

    def checked_start(self, args, options):
        values = tree_leaves([*args, *options.values()])  # those in tuples too
        memory.enter([value for value in values if isinstance(value, Tensor)])
        prepared.clear()
        return start(self, args, options)

    def prepare_once(function):
        # Triton does it anew for every call within a kernel, in most of the time that takes
        if id(function.__globals__) not in prepared:
            prepared.add(id(function.__globals__))
            return prepare_language(function)

    patch.setattr(builder, "create_masked_load", checked_load)
    patch.setattr(builder, "create_masked_store", checked_store)
    patch.setattr(executor, "_init_args_hst", checked_start)
    patch.setattr(interpreter, "_patch_lang", prepare_once)
    # tensors on the CPU are worked on in place; copied onto themselves, they would all be touched
    patch.setattr(executor, "_restore_args_dev", lambda *_: None)

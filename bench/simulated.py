"""A GPU that is not there: runs the branches that only its tensors take, and counts what they cost.

    with SimulatedGpu() as gpu:          # TRITON_INTERPRET=1, kernels are interpreted
        loss = segloss.cross_entropy(logits, target)
    gpu.faults, gpu.waits, gpu.launches, gpu.operations, gpu.peak

Inside, a tensor says that it is on `cuda:1` unless it was made on the CPU, while `cuda:0` is the
current device. What a real one refuses is refused or named in `faults`: tensors of two devices in
one operation, a kernel that is launched on another device than its tensors', products with
`out_dtype` on a HIP build, a cumulated float sum where algorithms have to be deterministic. As on a
real one, a number in a 0-dim tensor is rounded to the dtype of the tensor that it multiplies.

`SimulatedGpu(data=False)` has shapes alone: bytes, products and memory at any size, of what waits
for no result. Times are no part of it.
"""

from __future__ import annotations

import contextlib
import traceback
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
# where tensors are, and where a kernel goes that says nothing
DEVICE, CURRENT = torch.device("cuda", 1), 0

FACTORIES = {
    torch.empty, torch.zeros, torch.ones, torch.full, torch.arange, torch.tensor, torch.as_tensor,
    torch.rand, torch.randn, torch.randint, torch.randperm, torch.eye, torch.linspace,
    torch.from_numpy, torch.scalar_tensor, torch.empty_strided,
}  # fmt: skip
COPIED = {torch.tensor, torch.as_tensor}  # a number of the host's
# the host waits for their results
WAITING = {
    "item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "argwhere",
    "unique", "_unique2", "unique_consecutive", "masked_select", "bincount", "equal", "allclose",
    "cpu", "numpy", "is_nonzero",
}  # fmt: skip
ARITHMETIC = {
    f"{way}{name}{end}"
    for name in ("mul", "add", "sub", "div", "truediv")
    for way, end in (("", ""), ("", "_"), ("__", "__"), ("__r", "__"), ("__i", "__"))
}
PRODUCTS = {"mm", "addmm", "bmm", "addmv", "mv", "addmm_"}
# operations without a kernel of their own
FREE = {
    "view", "_unsafe_view", "reshape", "_reshape_alias", "as_strided", "t", "transpose", "permute",
    "expand", "slice", "select", "unsqueeze", "squeeze", "unbind", "split", "split_with_sizes",
    "chunk", "diagonal", "unfold", "view_as", "detach", "alias", "lift_fresh", "empty",
    "empty_like", "new_empty", "empty_strided", "new_empty_strided", "is_same_size", "set_",
    "resize_", "_local_scalar_dense",
}  # fmt: skip


def on_cpu(tensor: Tensor) -> Tensor:
    """The same data as a tensor that stays on the CPU when a GPU is simulated."""
    tensor = tensor.detach().clone()
    tensor._on_cpu = True
    return tensor


def is_on_cpu(tensor: Tensor) -> bool:
    return getattr(tensor, "_on_cpu", False)


def place() -> str:
    """The innermost line of the package that is running."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.parent.parent.name in ("segloss", ROOT.name) and path.parent.name in (
            "segloss", "kernels", "losses", "weighting", "selection", "sweep", "head", "sources",
            "integrations",
        ):  # fmt: skip
            return f"{path.parent.name}/{path.name}:{frame.lineno}"
    return "?"


class Operations(TorchDispatchMode):
    """Counts the launches, bytes, products and memory of torch's own operations."""

    def __init__(self):
        super().__init__()
        self.count: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()  # read and written, by operation
        self.flop = 0
        self.live = self.peak = 0
        self.known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():  # autograd's own operations are no calls
            result = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1]
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.allocated(given, made)
        if name in PRODUCTS:
            self.count[name] += 1
            a, b = args[-2:]  # an `out` is no positional argument
            self.flop += 2 * a.numel() * (b.shape[-1] if b.dim() > 1 else 1)
        elif name not in FREE:
            self.count[name] += 1
            self.bytes[name] += sum(size(t) for t in unique(given + made))
        return result

    def allocated(self, given: list[Tensor], made: list[Tensor]) -> None:
        before = {t.untyped_storage()._cdata for t in given}
        for tensor in made:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in before or key in self.known:
                continue
            nbytes = storage.nbytes()

            def freed(_, key=key, nbytes=nbytes):
                self.known.pop(key, None)
                self.live -= nbytes

            self.known[key] = weakref.ref(storage, freed)
            self.live += nbytes
            self.peak = max(self.peak, self.live)


def size(tensor: Tensor) -> int:
    """Bytes that a pass over it moves; one that is expanded is read once."""
    if 0 in tensor.stride() and tensor.numel():
        tensor = tensor[tuple(0 if s == 0 else slice(None) for s in tensor.stride())]
    return tensor.numel() * tensor.element_size()


def unique(tensors: list[Tensor]) -> list[Tensor]:
    return list({id(t): t for t in tensors}.values())


class SimulatedGpu(TorchFunctionMode):
    """See the head of this file."""

    def __init__(self, *, hip: bool = False, data: bool = True):
        super().__init__()
        self.hip, self.data = hip, data
        self.real = torch.device("cpu" if data else "meta")
        self.current = CURRENT
        self.faults: list[str] = []
        self.waits: Counter[str] = Counter()  # synchronisations, by operation and line
        self.launches: Counter[str] = Counter()  # of our kernels
        self.rows: Counter[str] = Counter()  # elements of each kernel's first tensor
        self.ops = Operations()
        self.stack = ExitStack()

    @property
    def operations(self) -> int:
        return sum(self.ops.count.values())

    @property
    def moved(self) -> int:
        """Bytes read and written by torch's operations, products apart."""
        return sum(self.ops.bytes.values())

    @property
    def peak(self) -> int:
        """The most bytes that were there at once beyond what there was before."""
        return self.ops.peak

    # ---------------------------------------------------------------------------- in and out

    def __enter__(self):
        from triton.runtime import interpreter

        run, gpu = interpreter.GridExecutor.__call__, self

        def launch(executor, *args, **options):
            gpu.launched(executor.fn.__name__, [*args, *options.values()])
            if gpu.data:
                with torch._C.DisableTorchFunction(), _disable_current_modes():
                    return run(executor, *args, **options)

        def exchange(index: int) -> int:
            before = self.current
            self.current = index if index >= 0 else before
            return before if index >= 0 else -1

        found = [
            patch.object(interpreter.GridExecutor, "__call__", launch),
            patch.object(torch.cuda, "_exchange_device", exchange),
            patch.object(torch.cuda, "_maybe_exchange_device", exchange),
            patch.object(torch.cuda, "current_device", lambda: self.current),
            # torch.autocast("cuda") is refused where there is none
            patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        ]
        if self.hip:
            found.append(patch.object(torch.version, "hip", "6.4"))
        for change in found:
            self.stack.enter_context(change)
        self.stack.enter_context(self.ops)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.stack.close()

    def launched(self, name: str, given: list) -> None:
        tensors = [t for t in tree_leaves(given) if isinstance(t, Tensor)]
        self.launches[name] += 1
        with torch._C.DisableTorchFunction():
            self.rows[name] += tensors[0].numel()
        if any(is_on_cpu(t) for t in tensors):
            self.faults.append(f"{name} is given a CPU tensor")
        if self.current != DEVICE.index:
            self.faults.append(f"{name} is launched on cuda:{self.current}, tensors on {DEVICE}")

    # ---------------------------------------------------------------------------- a call

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", str(function))
        if name == "__get__":
            return self.attribute(function, args)
        if name == "get_device":
            return -1 if is_on_cpu(args[0]) else DEVICE.index
        asked: list[str] = []
        args, kwargs = self.devices(name, args, kwargs, asked)
        if function in FACTORIES:
            return self.made(function, args, kwargs, asked)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        here = [t for t in tensors if not is_on_cpu(t)]
        self.check(name, tensors, here)
        if here:
            self.wait(name, args, kwargs, asked)
        if kwargs.get("out_dtype") is not None:
            return self.product(name, args, kwargs)
        if name in ARITHMETIC and here:
            args = self.rounded(args)
        result = function(*args, **kwargs)
        if tensors and not here and "cuda" in asked:  # from the host
            self.waits[f"{name} to the GPU at {place()}"] += 1
            return result.clone() if is_on_cpu(result) else result
        if (tensors and not here) or "cpu" in asked:
            for t in tree_leaves(result):
                if isinstance(t, Tensor):
                    t._on_cpu = True
        return result

    def attribute(self, function, args):
        name = getattr(getattr(function, "__self__", None), "__name__", "")
        cpu = is_on_cpu(args[0])
        known = {"device": CPU if cpu else DEVICE, "is_cuda": not cpu, "is_cpu": cpu,
                 "is_meta": False}  # fmt: skip
        return known[name] if name in known else function(*args)

    def devices(self, name: str, args: tuple, kwargs: dict, asked: list[str]):
        """The arguments with the device that data really lies on; `asked` gets what they said."""

        def real(value):
            is_device = isinstance(value, torch.device)
            if is_device or (isinstance(value, str) and value.split(":")[0] in ("cuda", "cpu")):
                asked.append(torch.device(value).type)
                return self.real if asked[-1] == "cuda" else CPU
            return value

        if name in ("to", "cuda", "new_tensor"):
            args = tuple(real(value) for value in args)
        return args, {k: real(v) if k == "device" else v for k, v in kwargs.items()}

    def made(self, function, args, kwargs, asked: list[str]) -> Tensor:
        if "cuda" in asked:
            if function in COPIED:
                self.waits[f"{function.__name__} on the GPU at {place()}"] += 1
            return function(*args, **kwargs)
        result = function(*args, **kwargs)
        result._on_cpu = True
        return result

    def check(self, name: str, tensors: list[Tensor], here: list[Tensor]) -> None:
        moves = ("to", "copy_", "__setitem__", "__deepcopy__", "set_")
        away = [t for t in tensors if is_on_cpu(t) and t.dim()]
        if here and away and name not in moves:
            shapes = ", ".join(str(tuple(t.shape)) for t in away)
            self.faults.append(f"{name} mixes devices at {place()}: {shapes} on the CPU")
        deterministic = torch.are_deterministic_algorithms_enabled()
        if deterministic and name == "cumsum" and here and tensors[0].is_floating_point():
            raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation")

    def wait(self, name: str, args: tuple, kwargs: dict, asked: list[str]) -> None:
        """Note what makes the host wait."""
        waits = name in WAITING or (name == "to" and "cpu" in asked)
        waits |= name == "where" and len(args) == 1
        waits |= name == "repeat_interleave" and "output_size" not in kwargs
        if name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            masks = (i for i in index if isinstance(i, Tensor) and i.dim())
            waits |= any(i.dtype in (torch.bool, torch.uint8) for i in masks)
            waits |= any(isinstance(i, list) for i in index)
        if waits:
            self.waits[f"{name} at {place()}"] += 1

    def product(self, name: str, args: tuple, kwargs: dict) -> Tensor:
        """A CPU has no product of half-precision factors into float32."""
        if self.hip:
            raise RuntimeError(f"{name} with out_dtype is not supported on ROCm")
        dtype, out = kwargs.pop("out_dtype"), kwargs.pop("out", None)
        plus = (args[0],) if name == "addmm" else ()
        made = out if out is not None else args[-1].new_empty(
            args[-2].shape[0], args[-1].shape[1], dtype=dtype
        )  # fmt: skip
        # as one operation: what it takes to imitate it does not count
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            result = args[-2].to(dtype) @ args[-1].to(dtype)
            made.copy_(result if not plus else plus[0] + result)
        self.ops.count[name] += 1
        self.ops.flop += 2 * args[-2].numel() * args[-1].shape[1]
        return made

    def rounded(self, args: tuple) -> tuple:
        """0-dim factors in the dtype of the tensor beside them."""
        large = [a for a in args if isinstance(a, Tensor) and a.dim() and a.is_floating_point()]
        if not large:
            return args
        dtype = large[0].dtype

        def as_loaded(value):
            if not (isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point()):
                return value
            wider = value.dtype.itemsize > dtype.itemsize
            return value.to(dtype) if wider and not is_on_cpu(value) else value

        return tuple(as_loaded(value) for value in args)


def gradients(value: Tensor, leaves: list[Tensor], upstream: Tensor | None = None) -> list[Tensor]:
    """`torch.autograd.grad` whose backward runs on the simulated GPU, too: the function itself is
    one call to it, below which nothing is simulated."""
    engine = torch.autograd.Variable._execution_engine
    grad = torch.ones_like(value) if upstream is None else upstream
    return list(engine.run_backward((value,), (grad,), False, False, tuple(leaves), False, False))


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)

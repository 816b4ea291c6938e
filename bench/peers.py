"""What else computes these losses: each is loaded, tried on a tiny input, and named with a reason
if it cannot run here.

N tokens, D hidden size, V classes, K of them present.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import segloss
from bench.common import value_and_grads
from segloss import reference

NEEDS_GPU = "needs a GPU"

# ------------------------------------------------------------------- cross-entropy, hidden states


def eager(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), target)


def torch_linear(chunks: str) -> Callable[..., Tensor]:
    """PyTorch's own: without chunks, with those it chooses, or with as many rows as ours."""
    function = F.linear_cross_entropy  # an AttributeError where torch does not have it

    def run(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        chosen = None
        if chunks == "own":
            chosen = torch.nn.LinearCrossEntropyOptions()
        elif chunks == "ours":
            rows = (
                segloss.LinearLogits(hidden.detach(), weight.detach())
                .inputs()
                .chunk_rows(len(target), trained=True)
            )
            chosen = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
        return function(hidden, weight, target, options=chosen)

    return run


def cce() -> Callable[..., Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    return functools.partial(linear_cross_entropy, impl="torch_compile")


def trl_chunked() -> Callable[..., Tensor]:
    """As `trl.trainer.utils.add_fused_lm_head` calls it, with its width of a chunk of V."""
    from trl.kernels import ChunkedLogProbFunction

    def run(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        outputs = ChunkedLogProbFunction.apply(
            hidden, weight, None, target, 1.0, 32768, None, 1.0, ()
        )
        return -outputs[0].mean()

    return run


EAGER = "eager, float32 logits"
HEAD = {
    EAGER: lambda: eager,
    "torch.compile(eager)": lambda: torch.compile(eager, dynamic=False),
    "F.linear_cross_entropy": lambda: torch_linear("none"),
    "F.linear_cross_entropy(options)": lambda: torch_linear("own"),
    "F.linear_cross_entropy(our chunks)": lambda: torch_linear("ours"),
    "CCE, torch_compile": cce,
    "TRL, chunked head": trl_chunked,
}
GPU_ONLY = ("CCE, its own kernels", "Liger, fused linear cross-entropy", "QuACK")


def head() -> tuple[dict[str, Callable[..., Tensor]], dict[str, str]]:
    """(what runs here, why the others do not)."""
    hidden, weight = torch.randn(2, 16, 8).to(torch.bfloat16)
    target = torch.arange(16)

    def works(peer) -> None:  # compilers need a C++ compiler
        value_and_grads(lambda h, w: peer(h, w, target), hidden, weight)

    found, missing = load(HEAD, works)
    return found, {**missing, **dict.fromkeys(GPU_ONLY, NEEDS_GPU)}


def load(makers: dict[str, Callable], works: Callable) -> tuple[dict, dict[str, str]]:
    found, missing = {}, {}
    for name, make in makers.items():
        try:
            peer = make()
            works(peer)
            found[name] = peer
        except Exception as error:  # a foreign library fails in any way; the report says how
            first = (str(error).splitlines() or [""])[0]
            missing[name] = f"{type(error).__name__}: {first}"[:200]
    return found, missing


# ----------------------------------------------------------------------------- losses on logits


def jaccard_steps(foreground: Tensor) -> Tensor:
    """Algorithm 1 of Berman et al.: the increase of the Jaccard loss at each sorted error."""
    total = foreground.sum()
    jaccard = 1 - (total - foreground.cumsum(0)) / (total + (1 - foreground).cumsum(0))
    return torch.cat([jaccard[:1], jaccard[1:] - jaccard[:-1]])


def lovasz_of_columns(columns, target: Tensor, classes: Tensor) -> Tensor:
    losses = []
    for column, c in zip(columns, classes, strict=True):
        foreground = (target == c).to(column.dtype)
        errors, order = (foreground - column).abs().sort(descending=True)
        losses.append(errors @ jaccard_steps(foreground[order]))
    return torch.stack(losses).mean()


def berman_loop(logits: Tensor, target: Tensor) -> Tensor:
    """As in the authors' code: class after class, each a column of the probabilities.

    In backward every column makes a gradient of N x V. Their code also visits absent classes, to
    pass over them; this one does not.
    """
    p = logits.float().softmax(-1)
    classes = target.unique()
    return lovasz_of_columns((p[:, c] for c in classes), target, classes)


def gathered_loop(logits: Tensor, target: Tensor) -> Tensor:
    """The same loop on columns taken out together: a better baseline than the published one."""
    p = logits.float().softmax(-1)
    classes = target.unique()
    return lovasz_of_columns(p[:, classes].unbind(1), target, classes)


@dataclass(frozen=True)
class Rival:
    """A loss of another library beside the same value of ours.

    `truth` is the float64 formula of what its documentation says it computes; it says in `note`
    where that differs from our default. All take (logits (N, V), target (N,)).
    """

    make: Callable[[], Callable]
    ours: Callable[..., Tensor]
    truth: Callable[..., Tensor]
    note: str = ""


def as_image(logits: Tensor) -> Tensor:
    """(N, V) -> (1, V, N, 1): one picture, a token a pixel."""
    return logits.T[None, :, :, None]


def monai_dice() -> Callable:
    from monai.losses import DiceLoss

    loss = DiceLoss(softmax=True, to_onehot_y=True, batch=True)
    return lambda z, y: loss(as_image(z), y[None, None, :, None])


def monai_focal() -> Callable:
    from monai.losses import FocalLoss

    loss = FocalLoss(use_softmax=True, to_onehot_y=True, gamma=2.0)
    return lambda z, y: z.shape[1] * loss(as_image(z), y[None, None, :, None])


def smp_losses():
    """`segmentation_models_pytorch.losses` alone: they need torch only, while the package's own
    import wants timm and torchvision for its encoders."""
    name = "segmentation_models_pytorch"
    if name not in sys.modules:
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise ImportError(f"{name} is not installed")
        parent = types.ModuleType(name)
        parent.__path__ = spec.submodule_search_locations
        sys.modules[name] = parent
    return importlib.import_module(f"{name}.losses")


def smp_dice() -> Callable:
    loss = smp_losses().DiceLoss("multiclass", smooth=5e-6)  # it counts twice there

    def run(z: Tensor, y: Tensor) -> Tensor:
        return z.shape[1] / y.unique().numel() * loss(as_image(z), y[None, :, None])

    return run


def smp_lovasz() -> Callable:
    loss = smp_losses().LovaszLoss("multiclass")
    return lambda z, y: loss(as_image(z), y[None, :, None])


def kornia_loss(name: str, **options) -> Callable:
    loss = getattr(importlib.import_module("kornia.losses"), name)
    return lambda z, y: loss(as_image(z), y[None, :, None], **options)


def kornia_focal() -> Callable:
    loss = kornia_loss("focal_loss", alpha=None, gamma=2.0, reduction="mean")
    return lambda z, y: z.shape[1] * loss(z, y)


OVER_CLASSES = "times V: its mean also runs over classes"
ALL_CLASSES = "mean over all V classes, absent ones too"
LOGITS: dict[str, Rival] = {
    "eager focal": Rival(
        lambda: lambda z, y: reference.focal_loss(z.float(), y),
        segloss.FocalLoss(), reference.focal_loss,
    ),
    "MONAI FocalLoss": Rival(
        monai_focal, segloss.FocalLoss(), reference.focal_loss,
        OVER_CLASSES,
    ),
    "kornia focal_loss": Rival(
        kornia_focal, segloss.FocalLoss(), reference.focal_loss, OVER_CLASSES,
    ),
    "eager Dice": Rival(
        lambda: lambda z, y: reference.dice_loss(z.float(), y),
        segloss.DiceLoss(), reference.dice_loss,
    ),
    "SMP DiceLoss": Rival(
        smp_dice, segloss.DiceLoss(), reference.dice_loss,
        "times V / K: absent classes are zeros in its mean",
    ),
    "kornia dice_loss(macro)": Rival(
        lambda: kornia_loss("dice_loss", average="macro"),
        segloss.DiceLoss(smooth=0.0), functools.partial(reference.dice_loss, smooth=0.0),
        "without smoothing of the numerator",
    ),
    "MONAI DiceLoss(batch)": Rival(
        monai_dice, segloss.DiceLoss(classes="all"),
        functools.partial(reference.dice_loss, classes="all"), ALL_CLASSES,
    ),
    "Lovász: loop, columns gathered first": Rival(
        lambda: gathered_loop, segloss.LovaszSoftmaxLoss(), reference.lovasz_softmax,
    ),
    "Berman's loop over present classes": Rival(
        lambda: berman_loop, segloss.LovaszSoftmaxLoss(), reference.lovasz_softmax,
    ),
    "SMP LovaszLoss (Berman's code)": Rival(
        smp_lovasz, segloss.LovaszSoftmaxLoss(), reference.lovasz_softmax,
    ),
    "kornia lovasz_softmax_loss": Rival(
        lambda: kornia_loss("lovasz_softmax_loss"), segloss.LovaszSoftmaxLoss(classes="all"),
        functools.partial(reference.lovasz_softmax, classes="all"), ALL_CLASSES,
    ),
}  # fmt: skip


def logits() -> tuple[dict[str, Callable[..., Tensor]], dict[str, str]]:
    """(what runs here, why the others do not)."""
    z, y = torch.randn(12, 5), torch.arange(12) % 4

    def works(peer) -> None:
        value_and_grads(lambda z: peer(z, y), z)

    return load({name: rival.make for name, rival in LOGITS.items()}, works)

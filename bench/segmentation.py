"""The losses of segmentation libraries beside ours, on a CPU: `python -m bench.segmentation`.

Each library's loss is held to the float64 formula that its documentation describes; one that is
not that formula is shown as wrong and has no time. A token is a pixel: logits (1, V, N, 1).

N tokens, V classes. float32: the libraries do not take bfloat16 throughout.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Sequence

from bench import inputs, peers
from bench.common import (
    Report,
    Section,
    Wrong,
    check,
    interleaved,
    options,
    value_and_grads,
)
from bench.core import forward_backward

# wrong is another formula, not another order of float32 additions
ANOTHER_FORMULA = 1e-4
# a peer that takes longer for one run has that run for its time
SLOW_SECONDS = 2.0


def measure(
    size: tuple[int, int], found: dict[str, Callable], missing: dict[str, str], report: Report
) -> None:
    logits, target = inputs.dense("zipf", *size)
    section = Section(
        "segmentation libraries, zipf, float32, N {}, V {}".format(*size),
        "segmentation",
        {},
        missing=dict(missing),
        facts=inputs.facts(logits, target),
        data={"notes": {name: rival.note for name, rival in peers.LOGITS.items()}},
    )
    runs, slow = {}, {}
    for truth in dict.fromkeys(rival.truth for rival in peers.LOGITS.values()):
        exact = value_and_grads(lambda z, f=truth: f(z, target), logits.double())
        plain = value_and_grads(lambda z, f=truth: f(z, target), logits)
        group = {n: rival for n, rival in peers.LOGITS.items() if rival.truth is truth}
        ours = ours_of(next(iter(group.values())).ours)
        section.rivals[ours] = list(group)
        candidates = {ours: next(iter(group.values())).ours}
        candidates |= {name: found[name] for name in group if name in found}
        for name, loss in candidates.items():
            start = time.perf_counter()
            actual = value_and_grads(lambda z, f=loss: f(z, target), logits)
            took = time.perf_counter() - start
            try:
                section.errors[name] = check(actual, exact, plain, ANOTHER_FORMULA)
            except Wrong as problem:
                section.wrong[name] = f"{problem}; value {actual[0]:.6g}, true {exact[0]:.6g}"
                continue
            if took > SLOW_SECONDS:
                slow[name] = [took]
            else:
                runs[name] = forward_backward(loss, logits, target)
    section.seconds = {
        **interleaved(runs, dict.fromkeys(runs, report.options.rounds)),
        **slow,
    }
    report.add(section)


def ours_of(loss) -> str:
    """`DiceLoss(classes='all')`: the name of a row of ours."""
    options = []
    if getattr(loss, "classes", "present") != "present":
        options.append(f"classes={loss.classes!r}")
    if getattr(loss, "smooth", 1e-5) != 1e-5:
        options.append(f"smooth={loss.smooth:g}")
    return f"{type(loss).__name__}({', '.join(options)})"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = options("segmentation", "Our losses beside segmentation libraries'.", rounds=7)
    chosen = parser.parse_args(arguments)
    size = (1024, 8192)
    if chosen.quick:
        chosen.rounds, size = 2, (128, 1024)
    warnings.simplefilter("ignore")  # of libraries, about themselves
    report = Report("Losses of segmentation libraries, forward + backward", chosen)
    measure(size, *peers.logits(), report)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())

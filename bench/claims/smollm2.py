"""SmolLM2-135M fine-tuned on the demo's task, by `segloss train`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from bench.claims.cells import Cell, slug
from bench.claims.model import exactness, packed, variant
from bench.demo import medmcqa

DEMO = Path(medmcqa.__file__).parent
# cross-entropy, the two losses that the paper puts first, and the demo's sum
LOSSES = ("ce", "focal", "lovasz", "0.6*ce+0.4*lovasz")
RATES = (1e-4, 3e-4, 1e-3)
SEEDS = 3
HELD_OUT = 1000
SPLITS = {"test": 0, "validation": 1}  # seeds of what is held out


def learn(loss: str, rate: float, seed: int, split: int, steps: int, held_out: int) -> dict:
    """Scores on held-out questions; the rest is as in the demo."""
    with tempfile.TemporaryDirectory() as folder:
        data, output = Path(folder) / "subjects.jsonl", Path(folder) / "run"
        words = (
            *("train", "--config", DEMO / "demo.yaml", "--data", data, "--loss", loss),
            *("--lr", rate, "--seed", seed, "--split-seed", split, "--steps", steps),
            # which segloss train chooses by the CPU, and the cells were made with
            *("--bf16", "true", "--batch-size", 16, "--eval-items", held_out),
            *("--no-evaluate-before", "--output", output),
        )
        code = "import sys; from segloss.command import main; sys.exit(main())"
        medmcqa.main(str(data))
        # the same numbers whatever the machine's cores
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", code, *map(str, words)]
        subprocess.run(command, check=True, env=environment)
        text = (output / "answers-after.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    true = [row["expected"].strip() for row in rows]
    names = sorted({*true, *(row["choice"] for row in rows)})
    said = np.array([names.index(row["choice"]) for row in rows], np.uint8)
    hit = np.array([row["choice"] == answer for row, answer in zip(rows, true, strict=True)])
    nll = np.array([row["nll"] / row["tokens"] for row in rows])
    return {
        "exact": float(hit.mean()),
        "mean_nll": float(nll.mean()),
        "hit": packed(np.packbits(hit)),
        "nll": packed(nll.astype(np.float16)),
        "said": packed(said),
        "names": names,
        "true": true,
    }


def run(loss: str, rates, seeds: int, steps: int, held_out: int) -> dict:
    def once(rate: float, seed: int, part: str) -> dict:
        return learn(loss, rate, seed, SPLITS[part], steps, held_out)

    return variant(once, rates, seeds, exactness) | {"loss": loss, "items": held_out}


def cells(quick: bool = False) -> list[Cell]:
    if quick:
        return [Cell("smollm2/ce", partial(run, "ce", RATES[:1], 1, 2, 20), 7, 60)]
    return [
        Cell(f"smollm2/{slug(loss)}", partial(run, loss, RATES, SEEDS, 48, HELD_OUT), 7,
             300.0 * (len(RATES) + SEEDS))
        for loss in LOSSES
    ]  # fmt: skip

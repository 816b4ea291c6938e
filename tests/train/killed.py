"""Runs `segloss train`, kills it at chosen file operations, resumes it; for test_resume.py.

    python killed.py FOLDER POINTS ARGUMENT...

FOLDER/whole is a run that was left alone, FOLDER/killed-0 and so on are runs that were killed and
resumed: at POINTS moments spread evenly over all of a run's file operations and lines of metrics.
Every run is a fork of this process, so that the imports are paid for once.
"""

import importlib
import json
import os
import signal
import sys
from pathlib import Path

EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "os.scandir"}


def kill_at(moment, folder, counter):
    """SIGKILL this process before its `moment`-th operation on the folder; counts them."""
    from segloss.train.trainer import Trainer

    count = 0

    def tick():
        nonlocal count
        if count == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        if moment is None:
            counter.write_text(str(count))

    def hook(event, arguments):
        if event in EVENTS and str(arguments[0]).startswith(folder):
            tick()

    note = Trainer._note

    def noted(self, rows):
        note(self, rows)
        tick()

    Trainer._note = noted
    sys.addaudithook(hook)


def run(arguments, log, prepare=lambda: None):
    """The exit code of the command in a fork, negative for a signal."""
    child = os.fork()
    if child == 0:
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        prepare()
        from segloss.command import main

        os._exit(main(arguments))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main():
    import torch

    for name in ("trl", "peft", "transformers.models.llama", "segloss.train.select"):
        importlib.import_module(name)
    importlib.import_module("segloss.train.evaluation")
    importlib.import_module("segloss.train.report")

    torch.set_num_threads(1)
    root, points, arguments = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    counter = root / "count"
    whole, log = root / "whole", root / "log"
    count = lambda: kill_at(None, str(root / "whole"), counter)  # noqa: E731
    assert run(["train", *arguments, "--output", str(whole)], log, count) == 0, log.read_text()
    total = int(counter.read_text())
    codes = []
    for index in range(points):
        moment = (total - 1) * (index + 1) // (points + 1)
        folder = root / f"killed-{index}"
        command = ["train", *arguments, "--output", str(folder)]
        kill = lambda m=moment, f=folder: kill_at(m, str(f), counter)  # noqa: E731
        first = run(command, log, kill)
        # before its settings are there, there is nothing to resume
        started = (folder / "segloss.json").exists()
        again = ["train", "--resume", str(folder)] if started else command
        codes.append((moment, first, run(again, log)))
    print(json.dumps({"total": total, "codes": codes}))


if __name__ == "__main__":
    main()

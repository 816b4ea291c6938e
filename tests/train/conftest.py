"""Fixtures for the driver: a model folder, a data file, and the command run in-process."""

import pytest
import torch
from train.tiny import build_model, build_tokenizer, examples, write_jsonl

from segloss.command import main


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On a tiny model threads only wait for each other, on a busy machine for seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("model")
    build_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def data_file(tmp_path):
    rows = examples("parity", 12, options=[" yes", " no"]) + examples("echo", 9)
    return write_jsonl(tmp_path / "data.jsonl", rows)


@pytest.fixture
def command(capsys):
    """`command("train", ...)` -> (exit code, stdout, stderr)."""

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def train(command, model_folder, data_file, tmp_path):
    """A short run on the tiny model; further arguments are appended, so the last one wins."""

    def run(*arguments):
        return command(
            *("train", "--model", model_folder, "--data", data_file, "--output", tmp_path / "run"),
            *("--steps", 3, "--batch-size", 4, "--eval-items", 4, "--logging-steps", 1),
            *arguments,
        )

    return run

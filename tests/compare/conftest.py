"""The driver's fixtures: a model folder and the command run in-process."""

from train.conftest import command, model_folder, one_thread, tokenizer

__all__ = ["command", "model_folder", "one_thread", "tokenizer"]

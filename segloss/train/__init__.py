"""The thin driver behind the `segloss` command: a training loop around the package's losses.

Nothing heavy is imported here; `run.py` imports transformers and matplotlib when a run starts.
"""

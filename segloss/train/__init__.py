"""The thin driver behind `segloss train`: transformers' Trainer with a segloss loss.

Nothing heavy is imported here; `run.py` imports transformers and matplotlib when a run starts.
"""

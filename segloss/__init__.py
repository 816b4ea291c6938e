"""Fused large-vocabulary losses."""

__version__ = "0.1.0"

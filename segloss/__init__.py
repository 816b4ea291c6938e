"""Fused large-vocabulary losses."""

"""`python -m bench.claims`: what four papers claim, measured; protocol and results in CLAIMS.md."""

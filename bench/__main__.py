"""`python -m bench [--quick]`: the losses on logits, then the losses on hidden states."""

import argparse
import sys

from bench import core, head

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: does everything run")
    arguments = ["--quick"] if parser.parse_args().quick else []
    sys.exit(max(core.main(arguments), head.main(arguments)))

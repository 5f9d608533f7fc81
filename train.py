"""Trains a ternary language model: the same as ``vaani train``.

python train.py --config=configs/small.py
"""

import sys

from vaani_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))

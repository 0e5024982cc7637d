"""Train a byte-level PaLM on text: enwik8 if it can be downloaded, or your own files.

python examples/train.py --data notes/ --dim 512 --num-steps 5000

This is the command `palm-rlhf train`, whose code is in palm_rlhf/commands/train_command.py.
"""

import sys

from palm_rlhf.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])

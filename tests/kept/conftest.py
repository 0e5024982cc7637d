"""The arithmetic in which the kept files were made."""

import os

os.environ["ACCELERATE_USE_CPU"] = "true"

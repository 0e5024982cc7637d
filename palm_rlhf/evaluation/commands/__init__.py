"""The commands of `palm-rlhf evaluate` that are too long for one file, and their shared arguments."""

"""The tools of a training run: processes, precision, optimisers, metrics and checkpoints."""

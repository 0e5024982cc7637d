"""The subcommands of `palm-rlhf` that need more than one of the other folders."""

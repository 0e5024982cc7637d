"""Floor 7: subcommands of the console script that need more than one of the floors below."""

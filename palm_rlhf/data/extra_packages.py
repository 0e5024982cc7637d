"""The error of a step whose packages are an extra."""


def missing(what: str, error: ImportError) -> ImportError:
    """Says which extra to install, for the one who asked for what needs it."""
    return ImportError(f"{what} needs packages that are not installed ({error}): pip install 'palm-rlhf[data]'")

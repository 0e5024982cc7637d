"""The error for a package of an extra that is not installed."""


def missing_extra(what: str, error: ImportError) -> ImportError:
    """Return the error that names the extra to install; `what` is the feature that needs its packages."""
    return ImportError(f"{what} needs packages that are not installed ({error}): pip install 'palm-rlhf[data]'")

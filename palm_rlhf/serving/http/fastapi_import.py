"""The packages of the server, which belong to the extra `serve`."""

from types import ModuleType


def fastapi_module() -> ModuleType:
    """Return FastAPI; ImportError that says how to install what is missing."""
    try:
        import fastapi
        import llguidance  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"the server needs packages that are not installed ({error}): pip install 'palm-rlhf[serve]'"
        ) from error
    return fastapi

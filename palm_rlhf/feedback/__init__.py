"""Feedback of people: asked for in a browser, kept in a database, learnt from in rounds.

The modules of this package import the packages of the extra `feedback`; other modules import this package inside the
functions that use it.
"""

try:
    import alembic  # noqa: F401
    import argon2  # noqa: F401
    import babel  # noqa: F401
    import fastapi  # noqa: F401
    import itsdangerous  # noqa: F401
    import scipy  # noqa: F401
    import sqlalchemy  # noqa: F401
    import uvicorn  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"feedback needs packages that are not installed ({error}): pip install 'palm-rlhf[feedback]'"
    ) from error

"""Opening a site: its database, the secret that signs its cookies, and its first admin."""

import logging
import os
import secrets
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from beartype import beartype
from sqlalchemy import make_url

from palm_rlhf.feedback.people.accounts import has_accounts, set_admin
from palm_rlhf.feedback.people.invitations import invite_first_admin
from palm_rlhf.feedback.people.passwords import Passwords
from palm_rlhf.feedback.settings import CollectionSettings
from palm_rlhf.feedback.store.database import Store
from palm_rlhf.feedback.store.table_base import utc_now
from palm_rlhf.feedback.web.site import Site
from palm_rlhf.model.files import read_text
from palm_rlhf.serving.http.access import Access

SECRET_VARIABLE = "PALM_RLHF_FEEDBACK_SECRET"
SHORTEST_SECRET = 32  # characters
FIRST_ADMIN = "admin"  # the name of the person of an admin's password file
logger = logging.getLogger(__name__)


@beartype
def open_site(
    database: str | Path,
    settings: CollectionSettings | None = None,
    *,
    access: Access,
    is_loopback: bool,
    secret_file: Path | None = None,
    admin_password_file: Path | None = None,
    passwords: Passwords | None = None,
) -> Site:
    """Open the site of a database; close its `store` after it.

    The cookies are signed by the secret of `secret_file`, or of the environment variable PALM_RLHF_FEEDBACK_SECRET, or
    of the file DATABASE.secret beside a SQLite database, which is made where it is missing. For PostgreSQL without
    either, the secret lasts as long as the process, and people log in again after it.

    Args:
        access: The hosts and origins from which the site may be used.
        is_loopback: Whether only this machine reaches the site: until somebody has a password, the visitor is then the
            one local person, who needs no login.
        secret_file: A file with a secret of at least 32 characters; it is made where it is missing.
        admin_password_file: A file with the password of the person `admin`, who is added where there is none. A changed
            password ends the sessions of that person.
        passwords: The cost of the hashes of passwords.
    """
    password = None if admin_password_file is None else read_text(admin_password_file).strip()
    store = Store(database)
    try:
        site = Site(
            store,
            settings or CollectionSettings(),
            secret=_secret(store.url, secret_file),
            is_local=is_loopback,
            access=access,
            passwords=passwords or Passwords(),
        )
        if password is not None:
            with store.writing() as session:
                set_admin(session, FIRST_ADMIN, password, site.passwords, utc_now())
    except BaseException:
        store.close()
        raise
    return site


@contextmanager
def opened_site(database: str | Path, settings: CollectionSettings | None = None, **options: Any) -> Iterator[Site]:
    """Open a site as `open_site` does, for the length of a block."""
    site = open_site(database, settings, **options)
    with closing(site.store):
        yield site


@beartype
def first_words(site: Site, url: str) -> str | None:
    """Return the words by which the first admin of a site is invited, or None where nobody has to be.

    On a site that only this machine reaches, the local person is an admin. On others somebody has to open a link, which
    is shown once, whenever the site is opened and has nobody who can log in.

    Args:
        url: The address of the site's first page; one of all networks is shown with the name of this machine.
    """
    if site.is_local:
        return None
    with site.store.reading() as session:
        if has_accounts(session):
            return None
    with site.store.writing() as session:
        secret = invite_first_admin(session, utc_now())
    if secret is None:
        return None
    for everywhere in ("//0.0.0.0", "//[::]"):
        url = url.replace(everywhere, f"//{socket.gethostname()}")
    return f"nobody can log in yet: open {url.rstrip('/')}/join/{secret} within a day to become the admin"


def _secret(url: str, file: Path | None) -> str:
    """Return the secret of a site."""
    if file is None and (found := os.environ.get(SECRET_VARIABLE)):
        return _checked_secret(found, f"the environment variable {SECRET_VARIABLE}")
    if file is None:
        address = make_url(url)
        if address.get_backend_name() != "sqlite":
            logger.warning("people have to log in again after a restart: keep a secret by the option --secret-file")
            return secrets.token_urlsafe(SHORTEST_SECRET)
        if address.database in (None, "", ":memory:"):
            return secrets.token_urlsafe(SHORTEST_SECRET)
        file = Path(f"{address.database}.secret")
    if not file.exists():
        _write_secret(file)
    if stat.S_IMODE(file.stat().st_mode) & 0o077:
        logger.warning("others on this machine can read %s: run chmod 600 %s", file, file)
    return _checked_secret(read_text(file).strip(), str(file))


def _checked_secret(secret: str, source: str) -> str:
    if len(secret) < SHORTEST_SECRET:
        raise ValueError(
            f"got a secret of {len(secret)} characters from {source}, expected at least {SHORTEST_SECRET}, such as "
            "openssl rand -base64 48 writes"
        )
    return secret


def _write_secret(file: Path) -> None:
    """Write a new secret, whole, unless another process has just written one."""
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.name)  # with mode 0600
    try:
        with os.fdopen(descriptor, "w") as stream:
            stream.write(secrets.token_urlsafe(48) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        try:
            os.link(temporary, file)
        except FileExistsError:
            pass
    finally:
        os.unlink(temporary)

"""The cookies of a site: signed, unread by scripts, and sent by the site's own pages only."""

import hmac
from typing import Literal

from fastapi import Request
from itsdangerous import BadData
from starlette.datastructures import MutableHeaders
from starlette.responses import Response

from palm_rlhf.feedback.people.accounts import SESSION_LASTS
from palm_rlhf.feedback.web.site import Site

Kind = Literal["session", "guest"]
LASTS: dict[Kind, int] = {"session": int(SESSION_LASTS.total_seconds()), "guest": 86400}  # seconds


def cookie_name(site: Site, kind: Kind, *, is_https: bool) -> str:
    """Return the name of a cookie, another one for each secret: several sites may run on one machine.

    Over HTTPS it begins with `__Host-`: browsers take such a cookie from this host alone.
    """
    tag = hmac.digest(site.secret.encode(), b"cookie", "sha256").hex()[:8]
    return f"{'__Host-' if is_https else ''}palm_rlhf_{kind}_{tag}"


def read_cookie(site: Site, request: Request, kind: Kind) -> str | None:
    """Return the id that a cookie of ours holds; None where there is none, or where the signature is not ours."""
    cookie = request.cookies.get(cookie_name(site, kind, is_https=request.url.scheme == "https"))
    try:
        found = site.serializer(kind).loads(cookie, max_age=LASTS[kind]) if cookie else None
    except BadData:
        return None
    return found if isinstance(found, str) else None


def add_cookie(site: Site, headers: MutableHeaders, kind: Kind, value: str, *, is_https: bool) -> None:
    """Add the cookie with a signed id to the headers of a reply; an empty id deletes it."""
    response = Response()
    response.set_cookie(
        cookie_name(site, kind, is_https=is_https),
        site.serializer(kind).dumps(value) if value else "",
        max_age=LASTS[kind] if value else 0,
        httponly=True,
        samesite="lax",
        secure=is_https,
        path="/",
    )
    headers.append("set-cookie", response.headers["set-cookie"])


def form_token(site: Site, kind: Kind, session_id: str) -> str:
    """Return the token of the forms of a session; nobody can make it without the site's secret."""
    return hmac.digest(site.secret.encode(), f"{kind} form:{session_id}".encode(), "sha256").hex()

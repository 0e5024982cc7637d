"""What all pages of a feedback site share: its store, settings, secret, texts and templates."""

import secrets
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fastapi import Request, Response
from fastapi.responses import HTMLResponse
from itsdangerous import URLSafeTimedSerializer
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from palm_rlhf.feedback.people.passwords import Passwords
from palm_rlhf.feedback.people.rate_limits import SiteLimits, Throttle
from palm_rlhf.feedback.refusals import FeedbackError
from palm_rlhf.feedback.settings import CollectionSettings
from palm_rlhf.feedback.store.database import Store
from palm_rlhf.feedback.web.catalogues import Catalogues
from palm_rlhf.feedback.web.navigation import is_known, links_for
from palm_rlhf.serving.http.access import Access

WEB = Path(__file__).parent
HTMX = {
    "allowEval": False,
    "historyCacheSize": 0,  # texts of people stay out of the browser's storage
    "includeIndicatorStyles": False,  # an inline style, which the policy forbids
    "refreshOnHistoryMiss": True,
    "responseHandling": [  # refusals are pages too: the form again, with the error beside its field
        {"code": "204", "swap": False},
        {"code": "[2345]..", "swap": True},
    ],
    "selfRequestsOnly": True,
}


@dataclass
class Site:
    """A feedback site; an application's `app.state.site`.

    `is_local` is whether only this machine reaches the site: until somebody has a password, a visitor without a login
    is then the one local person. `access` names the hosts by which the site is known; any other is refused, or a page
    of another site could point its own name here and speak as the local person.
    """

    store: Store
    settings: CollectionSettings = field(default_factory=CollectionSettings)
    secret: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)
    is_local: bool = False
    access: Access = field(default_factory=Access)
    limits: SiteLimits = field(default_factory=SiteLimits)
    passwords: Passwords = field(default_factory=Passwords)

    @cached_property
    def throttle(self) -> Throttle:
        """The counts of requests and of wrong passwords."""
        return Throttle(self.limits)

    @cached_property
    def catalogues(self) -> Catalogues:
        """The texts of the pages in all languages."""
        return Catalogues(WEB / "locales")

    @cached_property
    def environments(self) -> dict[str, Environment]:
        """The templates by the language of their texts; everything in them is escaped, and each is compiled once."""
        found = {}
        for language in self.catalogues.names:
            environment = Environment(
                loader=FileSystemLoader(WEB / "templates"),
                autoescape=True,
                undefined=StrictUndefined,
                extensions=["jinja2.ext.i18n"],
                trim_blocks=True,
                lstrip_blocks=True,
            )
            translations = self.catalogues[language]
            environment.install_gettext_translations(translations, newstyle=True)  # type: ignore[attr-defined]
            found[language] = environment
        return found

    def serializer(self, purpose: str) -> URLSafeTimedSerializer:
        """Return the signer of one kind of token; a token of another kind is refused."""
        return URLSafeTimedSerializer(self.secret, salt=f"palm-rlhf.feedback.{purpose}")

    def language_of(self, request: Request) -> str:
        """Return the language of the pages for a request: the browser's choice, or what it accepts."""
        visitor = getattr(request.state, "visitor", None)
        return self.catalogues.choose(
            request.query_params.get("lang"),
            request.cookies.get("lang"),
            None if visitor is None else visitor.person.language,
            request.headers.get("accept-language"),
        )

    def task_language(self, request: Request) -> str:
        """Return the language of the tasks for a request: the visitor's choice, or the pages' if it is collected."""
        visitor = getattr(request.state, "visitor", None)
        wishes = (None if visitor is None else visitor.person.language, self.language_of(request))
        return next((wish for wish in wishes if wish in self.settings.languages), self.settings.languages[0])

    def translate(self, request: Request, error: Exception) -> str:
        """Return the message of an error, in the language of the pages if the catalogue has it."""
        if not isinstance(error, FeedbackError):
            return str(error)
        message = self.catalogues[self.language_of(request)].gettext(error.template)
        return message.format(**error.values) if error.values else message

    def render(self, request: Request, template: str, *, status: int = 200, **values: Any) -> HTMLResponse:
        """Return a page, in the visitor's language.

        Templates have `request`, `visitor` (None before a login), `url(name, **path)`, `is_known(name)` of routes,
        `_()` for the texts of templates themselves, which are not escaped (`translate` is for errors), `language`,
        `direction` (ltr or rtl), and the values.
        """
        visitor = getattr(request.state, "visitor", None)
        language = self.language_of(request)
        known = {
            "request": request,
            "visitor": visitor,
            "url": lambda name, /, **path: request.url_for(name, **path).path,
            "language": language,
            "languages": self.catalogues.names,
            "direction": self.catalogues.direction(language),
            "language_path": request.url.path if request.method == "GET" else request.url_for("home").path,
            "navigation": list(links_for(request, visitor)),
            "is_known": lambda name: is_known(request, name),
            "is_local": visitor is not None and visitor.person.password_hash is None,
            "htmx_config": HTMX,
            "settings": self.settings,
        }
        html = self.environments[language].get_template(template).render(**known, **values)
        response = HTMLResponse(html, status_code=status)
        if request.query_params.get("lang") == language:
            self.keep_language(response, language)
        return response

    def keep_language(self, response: Response, language: str) -> None:
        """Keep the language of the pages in the browser."""
        response.set_cookie("lang", language, max_age=365 * 86400, samesite="lax", httponly=True)


def site_of(request: Request) -> Site:
    """Return the site that a request is for."""
    return request.app.state.site

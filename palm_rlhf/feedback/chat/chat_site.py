"""The feedback site of a server whose chat page asks for feedback."""

import random
from collections.abc import Callable
from pathlib import Path

from fastapi import FastAPI

from palm_rlhf.feedback.chat.chat_requests import ChatServer
from palm_rlhf.feedback.chat.chat_routes import add_chat
from palm_rlhf.feedback.store.identities import remember_model, weights_digest
from palm_rlhf.feedback.web.feedback_app import create_feedback_app
from palm_rlhf.feedback.web.site import Site
from palm_rlhf.serving.http.handlers import Handlers
from palm_rlhf.serving.served_model import ServedModel


def chat_site(site: Site, model: ServedModel, folder: Path | None = None) -> Callable[[Handlers], FastAPI]:
    """Return the function that makes the site's application, for `create_app` of a server.

    Args:
        site: The site, whose database learns of the model; close its store after the application.
        model: The model that answers in the chat page.
        folder: Where the model is.
    """
    model_id = weights_digest(model.palm)
    with site.store.writing() as session:
        remember_model(session, model_id, model.name, folder)

    def make(handlers: Handlers) -> FastAPI:
        app = create_feedback_app(site)
        add_chat(app, ChatServer(handlers, site.store, model_id, random.Random()))
        return app

    return make

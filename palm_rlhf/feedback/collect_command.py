"""The command ``palm-rlhf collect``: a web site on which people grow trees of messages, and compare answers."""

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Annotated, Literal

import torch
from beartype import beartype
from tyro.conf import OmitArgPrefixes, Positional, arg

from palm_rlhf.feedback.settings import CollectionSettings
from palm_rlhf.feedback.store.database import Store
from palm_rlhf.feedback.store.identities import remember_model, weights_digest
from palm_rlhf.feedback.trees.reply_worker import ReplyWorker
from palm_rlhf.feedback.web.feedback_app import create_feedback_app
from palm_rlhf.feedback.web.site_setup import first_words, opened_site
from palm_rlhf.model.local_model import local_model
from palm_rlhf.ops.sampling import UncheckedSampling
from palm_rlhf.serving.access_options import AccessOptions, is_loopback
from palm_rlhf.serving.engine import Engine
from palm_rlhf.serving.http.run_server import listen, make_server, url_of
from palm_rlhf.serving.served_model import load

logger = logging.getLogger(__name__)


@beartype
def collect(
    model: Annotated[Positional[str | None], arg(metavar="[MODEL]")] = None,
    *,
    database: str = "sqlite:///feedback.db",
    host: str = "127.0.0.1",
    port: int = 18889,
    settings: OmitArgPrefixes[CollectionSettings] = CollectionSettings(),  # noqa: B008 (it is frozen)
    template: Literal["auto", "plain", "default", "oasst", "vicuna", "openchat"] = "auto",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    device: Annotated[str | None, arg(metavar="DEVICE")] = None,
    sampling: OmitArgPrefixes[UncheckedSampling] = UncheckedSampling(),  # noqa: B008 (it is frozen)
    max_new_tokens: int = 256,
    seed: int = 0,
    allowed_hosts: tuple[str, ...] = (),
    forwarded_allow_ips: str = "",
    secret_file: Path | None = None,
    admin_password_file: Path | None = None,
) -> None:
    """Open a web site on which people write, label and rank messages, and compare answers of models.

    Trees of messages grow as in Open-Assistant, by five kinds of tasks: write a prompt, label a prompt, reply as the
    user or as the assistant, label a reply, and rank replies. The site runs until it is interrupted, and several may
    run on one database, as may `palm-rlhf learn`, which learns from what they collect.

    Two people are enough with --num-reviews 1 --num-rankings 1 --max-children 1, since nobody labels, answers or ranks
    their own messages. One person needs --allow-own too.

    Args:
        model: The model that replies in the trees: the folder of a run or of a model with its tokenizer and template,
            or a hub id, owner/name. Without one, all replies are people's.
        database: The database, which is made where there is none: the path of a file, sqlite:///PATH, or
            postgresql://USER@HOST/NAME.
        host: The address to listen on; 0.0.0.0 is every network that the machine is in.
        port: The port; 0 takes any free port.
        settings: Settings of the collection.
        template: The chat template; auto is the model's own, plain writes roles as words.
        dtype: The numeric type to compute with; auto is the type of the saved weights.
        device: Where the model computes, such as cpu or cuda:1; by default the first GPU where there is one.
        sampling: How the model's replies are sampled.
        max_new_tokens: The most tokens of a reply of the model.
        seed: The seed of the model's replies.
        allowed_hosts: Host names by which people may reach the site, with or without a port; *.NAME is every name below
            NAME, * is any name. On a loopback address the names of this machine are allowed too; on others all are,
            unless some are given.
        forwarded_allow_ips: Addresses or networks of proxies in front, separated by commas, which are believed about
            the addresses of people and about HTTPS; * is any.
        secret_file: A file with the secret by which cookies are signed, at least 32 characters, made where there is
            none. By default it is the environment variable PALM_RLHF_FEEDBACK_SECRET, or DATABASE.secret beside a
            database that is a file; for PostgreSQL without either, people log in again after a restart.
        admin_password_file: A file with the password of the person `admin`, who is added where there is none. Without
            one, a site that other machines reach prints a link by which its first admin joins.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    access = AccessOptions(allowed_hosts=allowed_hosts, forwarded_allow_ips=forwarded_allow_ips)
    if model is None:
        settings = dataclasses.replace(settings, num_model_replies=0)  # for which trees would wait for ever
    elif settings.num_model_replies == 0:
        raise ValueError("got a model and --num-model-replies 0: leave the model out, as it would not reply")
    if max_new_tokens < 1:
        raise ValueError(f"got max_new_tokens={max_new_tokens}, expected at least 1")
    options = {"template": template, "dtype": None if dtype == "auto" else getattr(torch, dtype), "device": device}
    replying = {"sampling": sampling.checked(), "max_new_tokens": max_new_tokens, "seed": seed}
    opening = {
        "access": access.hosts_and_origins(host, loopback=is_loopback(host)),
        "is_loopback": is_loopback(host),
        "secret_file": secret_file,
        "admin_password_file": admin_password_file,
    }
    with closing(listen(host, port)) as listener, opened_site(database, settings, **opening) as site:

        def say_where() -> None:
            print(f"feedback is collected at {url_of(listener)}", flush=True)
            if words := first_words(site, url_of(listener)):
                print(words, flush=True)

        with replies_of(model, options, site.store, settings, replying):
            app = create_feedback_app(site)
            server = make_server(app, connections=access.connections(), when_ready=say_where)
            with suppress(KeyboardInterrupt):  # Ctrl-C is how the site is stopped
                server.run([listener])


@contextmanager
def replies_of(
    checkpoint: str | None, options: dict, store: Store, settings: CollectionSettings, replying: dict
) -> Iterator[None]:
    """Let a model reply in the trees of a database, beside the rest of the program; None lets nobody reply.

    Args:
        checkpoint: A model's folder, or its id on the hub.
        options: Options of `load`.
        store: The database.
        settings: The settings of the collection.
        replying: Options of `ReplyWorker`.
    """
    if checkpoint is None:
        yield
        return
    served = load(checkpoint, **options)
    model_id = weights_digest(served.palm)
    with store.writing() as session:
        remember_model(session, model_id, served.name, local_model(checkpoint))
    with (
        Engine(served.palm, served.tokenizer) as engine,
        ReplyWorker(store, served, engine, settings, model_id=model_id, **replying),
    ):
        yield

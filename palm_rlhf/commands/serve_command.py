"""The command ``palm-rlhf serve``."""

import logging
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from beartype import beartype
from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction, arg

from palm_rlhf.model.quantised.quantised_weights import Quantisation
from palm_rlhf.serving.access_options import AccessOptions, is_loopback, num_bytes
from palm_rlhf.serving.http.access import Access

if TYPE_CHECKING:
    from palm_rlhf.feedback.web.site import Site
    from palm_rlhf.serving.engine import EngineConfig
    from palm_rlhf.serving.http.handlers import Handlers
    from palm_rlhf.serving.served_model import ServedModel

DEFAULT_ACCESS = AccessOptions()
logger = logging.getLogger(__name__)


@beartype
def serve(
    checkpoint: Annotated[Positional[str], arg(metavar="MODEL")],
    *,
    host: str = "127.0.0.1",
    port: int = 18888,
    name: Annotated[str | None, arg(metavar="NAME")] = None,
    context: Annotated[int | None, arg(metavar="TOKENS")] = None,
    template: Literal["auto", "plain", "default", "oasst", "vicuna", "openchat"] = "auto",
    lora_scope: Annotated[str | None, arg(metavar="NAME")] = None,
    lora: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="NAME=FOLDER")] = (),
    reward_model: Annotated[str | None, arg(metavar="MODEL")] = None,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    quantize: Quantisation | None = None,
    max_batch: Annotated[int | None, arg(metavar="REPLIES")] = None,
    queue: int = 64,
    timeout: float = 600.0,
    prefill_chunk: Annotated[int | None, arg(metavar="TOKENS")] = None,
    cache_memory: Annotated[str | None, arg(metavar="BYTES")] = None,
    prefix_memory: str = "256MB",
    device: Annotated[str | None, arg(metavar="DEVICE")] = None,
    feedback: Annotated[str | None, arg(metavar="DATABASE")] = None,
    access: OmitArgPrefixes[AccessOptions] = DEFAULT_ACCESS,
) -> None:
    """Answer over HTTP in OpenAI's protocol, with a chat page at /, until it is interrupted.

    API keys are read from --api-key-file, and from the environment variable PALM_RLHF_API_KEYS, separated by commas.
    Without any key, everyone who reaches the port is answered.

    Args:
        checkpoint: The folder of a run or of a model with its tokenizer and template, a .gguf file, a hub id,
            owner/name, or smollm2; without a tokenizer the tokens are bytes.
        host: The address to listen on; 0.0.0.0 is every network that the machine is in.
        port: The port; 0 takes any free port.
        name: What clients call the model; the folder's name by default.
        context: The most tokens of a prompt with its reply; the model's max_seq_len by default.
        template: The chat template; auto is the model's own, plain writes roles as words.
        lora_scope: A LoRA scope to merge into the weights.
        lora: An adapter beside the model, which clients call by its own name: a folder of PEFT or its hub id, or a
            folder of this model with a LoRA scope. May be given several times; all are computed in one batch.
        reward_model: A RewardModel in a folder or on the hub, for best_of and /v1/score.
        dtype: The numeric type to compute with; auto is the type of the saved weights, and for a GGUF file in fewer
            bits, bfloat16 where the device computes in it.
        quantize: Keep the matrices of the blocks in int8, a byte a weight, or int4, 4.5 bits a weight (NF4), by
            bitsandbytes: less memory, and on a CPU slower replies.
        max_batch: The most replies that are computed together; by default 16 on a CPU, and as many as the memory of a
            GPU holds, up to 256.
        queue: The most replies that may wait beyond them; more are refused with status 429.
        timeout: Seconds that a reply may take, its time in the queue included.
        prefill_chunk: The most tokens of prompts that are read between two tokens of the running replies; by default
            256 on a CPU, 2048 on a GPU.
        cache_memory: Memory for the keys and values of running replies, such as 2GB; by default 2 GiB on a CPU, and
            what the replies need on a GPU.
        prefix_memory: Memory for keys and values of ended replies, which prompts that begin alike reuse; 0 keeps none.
        device: Where to compute, such as cpu or cuda:1; by default the first GPU where there is one.
        feedback: A database in which people's judgments of answers are kept: the path of a file, sqlite:///PATH, or
            postgresql://USER@HOST/NAME. The chat page then has thumbs, better answers, and Compare, which shows two
            answers side by side; the pages of the feedback are under /feedback. `palm-rlhf learn` learns from it.
        access: Who may connect, and how much of the server they may use.
    """
    from palm_rlhf.serving.engine import EngineConfig

    if lora and feedback is not None:
        raise ValueError("got --lora with --feedback, expected one of them: judgments are kept of one model alone")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    config = EngineConfig(
        context=context,
        max_batch=max_batch,
        queue=queue,
        prefill_chunk=prefill_chunk,
        cache_memory=None if cache_memory is None else num_bytes("cache_memory", cache_memory),
        prefix_memory=num_bytes("prefix_memory", prefix_memory),
        timeout=timeout,
    )
    loading = {
        "name": name,
        "template": template,
        "lora_scope": lora_scope,
        "lora": lora,
        "reward_model": reward_model,
        "dtype": None if dtype == "auto" else getattr(torch, dtype),
        "device": device,
        "quantize": quantize,
    }
    serve_checkpoint(host, port, checkpoint, loading, config, access, feedback)


def serve_checkpoint(
    host: str,
    port: int,
    checkpoint: str,
    loading: dict[str, Any],
    config: "EngineConfig",
    access: AccessOptions,
    feedback: str | None = None,
) -> None:
    """Load a checkpoint, and answer requests until the command is interrupted."""
    from palm_rlhf.serving.engine import Engine
    from palm_rlhf.serving.http.app import create_app
    from palm_rlhf.serving.http.fastapi_import import fastapi_module
    from palm_rlhf.serving.http.run_server import listen, make_server, url_of
    from palm_rlhf.serving.served_model import load

    fastapi_module()  # before the model is loaded, which takes time that a missing package should not cost
    keys, limits, connections = access.keys(), access.limits(), access.connections()
    hosts_and_origins = access.hosts_and_origins(host, loopback=is_loopback(host))
    if not keys.secured and not is_loopback(host):
        logger.warning("other machines reach %s, and there are no API keys: everyone who reaches it is answered", host)
    # before the model is loaded: the port may be in use, and the database out of reach
    with closing(listen(host, port)) as listener, feedback_site(feedback, host, hosts_and_origins) as site:
        model = load(checkpoint, **loading)
        with Engine(model.palm, model.tokenizer, config) as engine:
            app = create_app(
                model,
                engine,
                api_keys=keys,
                limits=limits,
                access=hosts_and_origins,
                feedback=None if site is None else asking_for_feedback(site, model, checkpoint),
            )

            def say_where() -> None:
                print(f"{model.name} answers at {url_of(listener)}", flush=True)
                if site is not None:
                    say_how_to_log_in(site, url_of(listener))

            server = make_server(
                app, grace=access.grace, connections=connections, when_ready=say_where, when_late=engine.close
            )
            with suppress(KeyboardInterrupt):  # Ctrl-C is how the server is stopped
                server.run([listener])


@contextmanager
def feedback_site(database: str | None, host: str, access: Access) -> Iterator["Site | None"]:
    """Open the feedback site of a database; None without a database. No model replies in its trees."""
    if database is None:
        yield None
        return
    from palm_rlhf.feedback.settings import CollectionSettings
    from palm_rlhf.feedback.web.site_setup import opened_site

    logging.getLogger("alembic").setLevel(logging.WARNING)
    settings = CollectionSettings(num_model_replies=0)
    with opened_site(database, settings, access=access, is_loopback=is_loopback(host)) as site:
        yield site


def asking_for_feedback(site: "Site", model: "ServedModel", checkpoint: str) -> "Callable[[Handlers], Any]":
    """Return the function that makes the application of /feedback for a model's chat page."""
    from palm_rlhf.feedback.chat.chat_site import chat_site
    from palm_rlhf.model.local_model import local_model

    return chat_site(site, model, local_model(checkpoint))


def say_how_to_log_in(site: "Site", url: str) -> None:
    """Print the link of the first admin, where other machines reach the site and nobody can log in yet."""
    from palm_rlhf.feedback.web.site_setup import first_words

    if words := first_words(site, f"{url}/feedback"):
        print(words, flush=True)

"""The command ``palm-rlhf serve``."""

import ipaddress
import logging
import os
from contextlib import closing, suppress
from pathlib import Path
from typing import Annotated, Literal

import torch
from beartype import beartype
from tyro.conf import Positional, arg

from palm_rlhf.model.interop.folder import parse_size
from palm_rlhf.model.interop.text_file import read_text

KEYS_VARIABLE = "PALM_RLHF_API_KEYS"
logger = logging.getLogger(__name__)


@beartype
def serve(
    checkpoint: Annotated[Positional[Path], arg(metavar="CHECKPOINT")],
    *,
    host: str = "127.0.0.1",
    port: int = 18888,
    name: Annotated[str | None, arg(metavar="NAME")] = None,
    context: Annotated[int | None, arg(metavar="TOKENS")] = None,
    template: Literal["auto", "plain", "default", "oasst", "vicuna", "openchat"] = "auto",
    lora_scope: Annotated[str | None, arg(metavar="NAME")] = None,
    reward_model: Annotated[Path | None, arg(metavar="FOLDER")] = None,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    max_batch: int = 16,
    queue: int = 64,
    timeout: float = 600.0,
    prefill_chunk: int = 256,
    cache_memory: str = "2GB",
    prefix_memory: str = "256MB",
    max_body: str = "4MB",
    api_key_file: Annotated[Path | None, arg(metavar="FILE")] = None,
) -> None:
    """Answer over HTTP in OpenAI's protocol, with a chat page at /, until it is interrupted.

    Keys that clients have to send are read from --api-key-file, and from the environment variable PALM_RLHF_API_KEYS,
    separated by commas. Without any, everyone who reaches the port is answered.

    Args:
        checkpoint: A folder that save_pretrained wrote, with its tokenizer and template; else its tokens are bytes.
        host: The address to listen on; 0.0.0.0 is every network that the machine is in.
        port: The port; 0 takes any that is free.
        name: What clients call the model; the folder's name by default.
        context: Tokens of a prompt with its reply; the model's max_seq_len by default.
        template: How conversations are written; auto is the model's own, plain has roles as words.
        lora_scope: A LoRA scope to merge into the weights.
        reward_model: A folder of a RewardModel, for best_of and /v1/score.
        dtype: The numbers to compute with; auto is those of the file.
        max_batch: Replies that are computed together.
        queue: Replies that may wait beyond them; more are refused with status 429.
        timeout: Seconds that a reply may take, the time in the queue included.
        prefill_chunk: Tokens of prompts that are read between two tokens of the running replies.
        cache_memory: Memory of the keys and values of running replies.
        prefix_memory: Memory of those of what prompts may begin with; 0 keeps none.
        max_body: What a request may hold.
        api_key_file: A file of keys, one a line.
    """
    from palm_rlhf.serving.background import listen, make_server, url_of
    from palm_rlhf.serving.bodies import Limits
    from palm_rlhf.serving.engine import Engine, EngineConfig
    from palm_rlhf.serving.served import load
    from palm_rlhf.serving.server import create_app

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    keys = read_keys(api_key_file)
    if not keys and not is_loopback(host):
        logger.warning("%s is not this machine alone, and there are no API keys: everyone who reaches it may ask", host)
    config = EngineConfig(
        context=context,
        max_batch=max_batch,
        queue=queue,
        prefill_chunk=prefill_chunk,
        cache_memory=num_bytes("cache_memory", cache_memory),
        prefix_memory=num_bytes("prefix_memory", prefix_memory),
        timeout=timeout,
    )
    limits = Limits(max_body=num_bytes("max_body", max_body))
    with closing(listen(host, port)) as listener:  # first: a port in use should not cost the time to load a model
        served = load(
            checkpoint,
            name=name,
            template=template,
            lora_scope=lora_scope,
            reward_model=reward_model,
            dtype=None if dtype == "auto" else getattr(torch, dtype),
        )
        with Engine(served.palm, served.tokenizer, config) as engine:
            app = create_app(served, engine, api_keys=keys, limits=limits)
            ready = f"{served.name} answers at {url_of(listener)}"
            with suppress(KeyboardInterrupt):  # which is how it is stopped
                server = make_server(app, when_ready=lambda: print(ready, flush=True), when_late=engine.close)
                server.run([listener])


def read_keys(file: Path | None) -> list[str]:
    """The API keys of a file and of the environment; ValueError for a file without any."""
    keys = [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",")]
    if file is not None:
        lines = [line.strip() for line in read_text(file).splitlines()]
        if not any(lines):
            raise ValueError(f"{file} has no API key; expected one a line")
        keys += lines
    return [key for key in keys if key]


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def num_bytes(name: str, size: str) -> int:
    """Bytes in a size such as "2GB" or "4096"; ValueError that names the option."""
    if size.isascii() and size.isdigit():
        return int(size)
    try:
        return parse_size(size)
    except ValueError as error:
        raise ValueError(f'{name} is {size!r}; expected bytes, or a size such as "2GB" or "512MiB"') from error

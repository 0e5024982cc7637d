"""The command ``palm-rlhf chat``: a conversation with a model, in a terminal or by pipes."""

import contextlib
import io
import math
import sys
from typing import Annotated, Literal

import torch
from beartype import beartype
from tyro.conf import OmitArgPrefixes, Positional, arg

from palm_rlhf.model.quantised.quantised_weights import Quantisation
from palm_rlhf.serving.dialogue import ChatSampling, Dialogue, recommended_sampling
from palm_rlhf.serving.engine import Engine, EngineConfig
from palm_rlhf.serving.engine.slot_cache import SlotCache
from palm_rlhf.serving.served_model import load
from palm_rlhf.serving.terminal import TerminalSession, note


@beartype
def chat(
    checkpoint: Annotated[Positional[str], arg(metavar="MODEL")],
    *,
    once: Annotated[str | None, arg(metavar="TEXT")] = None,
    system: Annotated[str | None, arg(metavar="TEXT")] = None,
    sampling: OmitArgPrefixes[ChatSampling] = ChatSampling(),  # noqa: B008 (it is frozen)
    max_tokens: Annotated[int | None, arg(metavar="TOKENS")] = None,
    seed: Annotated[int | None, arg(metavar="INT")] = None,
    context: Annotated[int | None, arg(metavar="TOKENS")] = None,
    template: Literal["auto", "plain", "default", "oasst", "vicuna", "openchat"] = "auto",
    lora_scope: Annotated[str | None, arg(metavar="NAME")] = None,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    quantize: Quantisation | None = None,
) -> None:
    """Talk with a model in the terminal: it remembers what was said, and its replies come word by word.

    /help lists the commands, such as /reset, /system and /save. Where the input is a pipe, each line is a message, and
    the output has only the replies. With --once there is one message and one reply.

    Args:
        checkpoint: The folder of a run or of a model with its tokenizer and template, a .gguf file, a hub id,
            owner/name, or smollm2; without a tokenizer the tokens are bytes.
        once: Print the reply to this message, and end; - reads the message from standard input.
        system: A system message, such as "You are brief."
        sampling: How each token is sampled. The temperature, top-k, top-p and min-p that are not given are those of the
            model's generation_config.json, where it has them.
        max_tokens: The most tokens of a reply; by default as many as the context has room for.
        seed: Makes the replies repeatable; by default they differ each time.
        context: The most tokens of the conversation with the reply; the model's max_seq_len by default.
        template: The chat template; auto is the model's own, plain writes roles as words.
        lora_scope: A LoRA scope to merge into the weights.
        dtype: The numeric type to compute with; auto is the type of the saved weights, and for a GGUF file in fewer
            bits, bfloat16 where the device computes in it.
        quantize: Keep the matrices of the blocks in int8, a byte a weight, or int4, 4.5 bits a weight (NF4), by
            bitsandbytes: less memory, and on a CPU slower replies.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"got max_tokens={max_tokens}, expected at least 1")
    sampling.over({})  # an option out of range fails before the model is loaded
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (importing it gives `input` a history)
    weights = None if dtype == "auto" else getattr(torch, dtype)
    if sys.stderr.isatty():
        note(f"opening {checkpoint}")
    model = load(checkpoint, template=template, lora_scope=lora_scope, dtype=weights, quantize=quantize)
    size = (context or model.palm.config.max_seq_len) * SlotCache.bytes_per_token(model.palm)
    config = EngineConfig(
        context=context,
        max_batch=1,
        queue=8,  # for replies that were stopped: they leave with the next token
        cache_memory=max(2 * size, 2**31),
        prefix_memory=max(2 * size, 2**28),
        timeout=math.inf,
    )
    with Engine(model.palm, model.tokenizer, config) as engine:
        chosen = sampling.over(recommended_sampling(model.tokenizer))
        dialogue = Dialogue(model, engine, system=system, sampling=chosen, max_tokens=max_tokens, seed=seed)
        session = TerminalSession(dialogue)
        if once is not None:
            session.answer_once(once)
            return
        if session.is_person:
            note(f"{model.name}, with {engine.context:,} tokens of context. /help lists the commands, Ctrl-D ends.")
        session.run()

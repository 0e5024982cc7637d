"""The prompt as the beginning of its reply, for requests that ask for an echo."""

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

from palm_rlhf.data.tokenizer import Tokenizer
from palm_rlhf.serving.generation import Generation, Piece, TokenLogprob
from palm_rlhf.serving.protocol.event_stream import Blocks
from palm_rlhf.serving.token_text import spelled


async def with_prompts(
    blocks: Blocks,
    tokenizer: Tokenizer,
    prompts: Sequence[Any],
    generations: Sequence[Generation],
) -> Blocks:
    """Yield the pieces of replies, each reply after a piece that is its prompt.

    `prompts` are texts or token ids, by the number of the reply.
    """
    lengths: dict[int, int] = {}
    async with aclosing(blocks):
        async for found in blocks:
            block = []
            for number, piece in found:
                if number not in lengths:
                    echo = await asyncio.to_thread(prompt_piece, tokenizer, prompts[number], generations[number])
                    lengths[number] = len(echo.text)
                    block.append((number, echo))
                logprobs = tuple(one._replace(offset=one.offset + lengths[number]) for one in piece.logprobs)
                block.append((number, piece._replace(logprobs=logprobs)))
            yield block


def prompt_piece(tokenizer: Tokenizer, prompt: str | list[int], generation: Generation) -> Piece:
    """Return a prompt that has been read as a piece of text, with log-probabilities where the request asks for them.

    Nothing comes before the first token, so its log-probability is None.
    """
    request = generation.request
    text, offsets = spelled(tokenizer, request.prompt)
    logprobs: tuple[TokenLogprob, ...] = ()
    if request.logprobs is not None:
        known = [TokenLogprob(request.prompt[0], None, ()), *generation.prompt_logprobs]
        logprobs = tuple(
            one._replace(alternatives=one.alternatives[: request.logprobs], offset=offset)
            for one, offset in zip(known, offsets)
        )
    return Piece(prompt if isinstance(prompt, str) else text, logprobs)

"""The answers of the chat page as rows of the database, written at the moment their stream ends, also when cut."""

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from palm_rlhf.feedback.store.answer_tables import Answer, ShownComparison
from palm_rlhf.feedback.store.database import Store, StoreError
from palm_rlhf.feedback.store.identities import prompt_key_of
from palm_rlhf.feedback.store.table_base import new_id
from palm_rlhf.serving.generation import Generation, Piece, Request
from palm_rlhf.serving.protocol.event_stream import EventStream
from palm_rlhf.serving.protocol.openai_replies import CompletionWriter, event

ENDS = ("stop", "length")  # of answers that were not broken off
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AskedAnswers:
    """One answer, or two side by side, that a person has asked for.

    Args:
        person_id: Who asked.
        model_id: The digest of the model's weights.
        prompt: The conversation, which ends with a message of the user.
        begun: The beginning of the answer, where the person lets one go on that was cut.
        requests: The request to the engine for each answer, from left to right.
    """

    person_id: str
    model_id: str
    prompt: list[dict[str, str]]
    begun: str
    requests: Sequence[Request]
    ids: list[str] = field(default_factory=list)
    comparison_id: str = field(default_factory=new_id)

    def __post_init__(self) -> None:
        self.ids.extend(new_id() for _ in self.requests)

    def rows(self, texts: Sequence[str], ends: Sequence[str | None], now: datetime) -> list[Answer | ShownComparison]:
        """Return the rows to write for answers that have ended: none for an answer that was stopped before it began.

        A comparison is among them if there are two different answers that were not broken off.
        """
        parts = list(zip(self.ids, self.requests, texts, ends, strict=True))
        rows: list[Answer | ShownComparison] = [
            self._answer(answer_id, request, text, end, now) for answer_id, request, text, end in parts if text or end
        ]
        if len(parts) == 2 and all(end in ENDS for end in ends) and len({text.strip() for text in texts}) == 2:
            comparison = ShownComparison(
                id=self.comparison_id,
                prompt_key=prompt_key_of(self.prompt),
                left_id=self.ids[0],
                right_id=self.ids[1],
                person_id=self.person_id,
                chosen_by="chat",
                purpose="training",
                created_at=now,
            )
            rows.append(comparison)
        return rows

    def _answer(self, answer_id: str, request: Request, text: str, end: str | None, now: datetime) -> Answer:
        sampling = {**request.options, "max_new_tokens": request.max_new_tokens, "seed": request.seed}
        sampling |= {"index": request.index, "stop": list(request.stop), "begun": len(self.begun)}
        return Answer(
            id=answer_id,
            prompt_key=prompt_key_of(self.prompt),
            prompt=self.prompt,
            text=self.begun + text,
            finish=end or "stopped",
            model_id=self.model_id,
            sampling=sampling,
            purpose="chat",
            person_id=self.person_id,
            created_at=now,
        )


@dataclass(frozen=True)
class KeptWriter(CompletionWriter):
    """A writer of a chat's chunks that keeps the texts it has written, by the number of the answer.

    It leaves out the end of the stream, which comes after the answers are in the database.
    """

    pieces: dict[int, list[str]] = field(default_factory=dict)
    ends: dict[int, str] = field(default_factory=dict)

    def block(self, found: Sequence[tuple[int, Piece]], generations: Sequence[Generation]) -> bytes:
        """Return the chunks of the pieces that have come, and keep their texts.

        A null character, which PostgreSQL does not keep, becomes the replacement character in both.
        """
        found = [(number, piece._replace(text=piece.text.replace("\0", "\ufffd"))) for number, piece in found]
        for number, piece in found:
            self.pieces.setdefault(number, []).append(piece.text)
            if piece.finish_reason is not None:
                self.ends[number] = piece.finish_reason
        return super().block(found, generations)

    @property
    def end(self) -> bytes:
        return b""


def keeping(
    stream: EventStream, writer: KeptWriter, asked: AskedAnswers, store: Store, now: Callable[[], datetime]
) -> EventStream:
    """Return a stream whose answers are kept.

    Its first event has the ids of the answers, `{"feedback": {"answers": [...]}}`. An event after all others says which
    of them are in the database, `{"feedback": {"kept": [...], "comparison": ID or null, "error": WORDS or null}}`: the
    client can rely on it, and on nothing before.
    """

    def keep() -> dict[str, Any]:
        numbers = range(len(asked.ids))
        texts = ["".join(writer.pieces.get(number, ())) for number in numbers]
        rows = asked.rows(texts, [writer.ends.get(number) for number in numbers], now())
        try:
            with store.writing() as session:
                for row in rows:  # one after the other: a comparison refers to its answers
                    session.add(row)
                    session.flush()
        except StoreError as error:
            logger.error("answers of the chat page are not kept: %s", error)
            return {"kept": [], "comparison": None, "error": str(error)}
        kept = [row.id for row in rows if isinstance(row, Answer)]
        compared = next((row.id for row in rows if isinstance(row, ShownComparison)), None)
        return {"kept": kept, "comparison": compared, "error": None}

    async def events() -> AsyncGenerator[bytes, None]:
        yield event({"feedback": {"answers": asked.ids}})
        try:
            async with aclosing(stream.events) as blocks:
                async for block in blocks:
                    yield block
        finally:  # also where the client has gone: what it has read is kept
            kept = await asyncio.shield(asyncio.to_thread(keep))
        yield event({"feedback": kept})
        yield event("[DONE]")

    return EventStream(events(), stream.generations)


def shuffled(requests: Sequence[Request], rng: random.Random) -> list[Request]:
    """Return the requests in a random order, from left to right."""
    return rng.sample(list(requests), len(requests))

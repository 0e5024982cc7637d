"""Requests to judges, their replies, and the interface of all judges."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from palm_rlhf.evaluation.judging.answers import Question, Turns
from palm_rlhf.evaluation.judging.judge_prompts import Messages, Method, judge_messages


@dataclass(frozen=True)
class JudgeRequest:
    """A request for one judgment of the answers to a turn, in the order in which the judge sees them."""

    question: Question
    turn: int
    models: tuple[str, ...]
    replies: tuple[Turns, ...]
    method: Method
    swapped: bool = False
    """Whether model 1 is shown second."""
    sample: int = 0

    @cached_property
    def messages(self) -> Messages:
        return judge_messages(self.method, self.question, self.replies, self.turn)

    def key(self, judge: "Judge") -> str:
        """Return the identity of the judgment: a digest of everything that decides it, and of nothing else."""
        decisive = [judge.identity, self.method, self.messages, self.models, self.swapped, self.sample]
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


class JudgeReply(NamedTuple):
    """A judge's reply: a text to parse, or the scores of the answers in the order shown."""

    text: str | None = None
    scores: Sequence[float] | None = None
    usage: dict[str, Any] | None = None


class Judge:
    """A judge. `identity` holds its settings that decide a judgment; `sees_order` tells whether the order can."""

    name: str
    identity: dict[str, Any]
    sees_order = True
    max_concurrency: int | None = None

    def __call__(self, request: JudgeRequest) -> JudgeReply:
        """Return the judgment. Raises OSError if the judge cannot be reached."""
        raise NotImplementedError

    def stop(self) -> None:
        """Give up waiting for retries."""

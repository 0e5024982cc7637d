"""What the chat page may ask for: an answer or two, and judgments, as JSON."""

import random
from dataclasses import dataclass
from typing import Any

from palm_rlhf.feedback.chat.kept_answers import AskedAnswers, shuffled
from palm_rlhf.feedback.judgments.judging import VERDICTS
from palm_rlhf.feedback.refusals import FeedbackError
from palm_rlhf.feedback.store.answer_tables import Answer
from palm_rlhf.feedback.store.database import Store
from palm_rlhf.serving.http.handlers import Handlers
from palm_rlhf.serving.protocol.openai_requests import ParsedRequest, read_json

SEEDS = 2**31
MOST_IDS = 1000  # of one request for what was given
ID = {"type": "string", "maxLength": 36}
IDS = {"type": "array", "items": ID, "maxItems": MOST_IDS}


def body_schema(**properties: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of an object that has exactly these entries."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


GIVEN = body_schema(answers=IDS, comparisons=IDS)
REACTION = body_schema(answer=ID, value={"type": "integer", "minimum": -1, "maximum": 1})
CORRECTION = body_schema(answer=ID, text={"type": "string"})
VOTE = body_schema(comparison=ID, verdict={"type": "string", "enum": list(VERDICTS)})
WITHDRAWAL = body_schema(table={"type": "string", "maxLength": 40}, id=ID)

# The entries of a chat completion that the page sends; an answer by others, such as tools, could not be judged.
ALLOWED = {"model", "messages", "temperature", "top_p", "max_tokens", "stop", "seed", "stream"}
CONTINUING = {"continue_final_message", "add_generation_prompt"}


@dataclass
class ChatServer:
    """The model that answers in the chat page, by the server's own handlers of requests.

    `rng` draws seeds, and which of two answers stands left. `model_id` is the digest of the model's weights.
    """

    handlers: Handlers
    store: Store
    model_id: str
    rng: random.Random

    def read(
        self, body: bytes | bytearray, client: str, person_id: str, number: int
    ) -> tuple[ParsedRequest, AskedAnswers]:
        """Return a request for some answers to a conversation; ApiError or FeedbackError where it cannot be answered.

        The body is that of a chat completion. With `continues`, the id of an answer that was cut, its last message is
        that answer, and goes on.
        """
        values = read_json(body)
        continued = values.pop("continues", None)
        allowed = ALLOWED if continued is None else ALLOWED | CONTINUING
        if unknown := sorted(values.keys() - allowed):
            raise FeedbackError(f"got {unknown[0]!a:.80}, expected only {', '.join(sorted(allowed))}")
        if number > 1 and (continued is not None or values.get("temperature") == 0):
            raise FeedbackError("two answers would be the same: choose a temperature above 0 to compare", 422)
        if values.get("seed") is None:
            values["seed"] = self.rng.randrange(SEEDS)
        parsed, requests = self.handlers.parse("chat", {**values, "stream": True, "n": number}, client)
        prompt = [_plain(message) for message in parsed.prompts[0]]
        begun = ""
        if parsed.continued:
            begun = prompt.pop()["content"]
            self._check_begun(continued, begun, person_id)
        elif continued is not None:
            raise FeedbackError("got continues without continue_final_message, expected both or none")
        if not prompt or prompt[-1]["role"] != "user":
            raise FeedbackError("the conversation ends with no message of the user: there is nothing to answer")
        return parsed, AskedAnswers(person_id, self.model_id, prompt, begun, shuffled(requests, self.rng))

    def _check_begun(self, answer_id: Any, begun: str, person_id: str) -> None:
        """Check that an answer which is to go on is the person's, in its own words: else anybody could forge one."""
        with self.store.reading() as session:
            answer = session.get(Answer, answer_id) if isinstance(answer_id, str) else None
        if answer is None or answer.person_id != person_id or answer.text != begun:
            raise FeedbackError("the answer that is to go on is not one that you were given, in its own words", 403)


def _plain(message: dict[str, Any]) -> dict[str, str]:
    if extra := sorted(message.keys() - {"role", "content"}):
        raise FeedbackError(f"got a message with {extra[0]!a:.40}, expected a role and a content")
    return {"role": message["role"], "content": message["content"]}

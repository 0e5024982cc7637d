"""OpenAI's Responses API: a reply to a text or to messages, whole or as a stream of events. Nothing is stored."""

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from palm_rlhf.serving.generation import Generation, Piece
from palm_rlhf.serving.protocol.errors import ApiError
from palm_rlhf.serving.protocol.openai_replies import usage
from palm_rlhf.serving.protocol.openai_requests import ParsedRequest, common, json_schema, plain
from palm_rlhf.serving.protocol.responses_parameters import RESPONSE
from palm_rlhf.serving.protocol.schema import check


def read_response(body: dict[str, Any]) -> ParsedRequest:
    """Return a parsed request for a response."""
    values = check(body, RESPONSE)
    messages, instructions = values["input"], values.get("instructions")
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if instructions is not None:
        messages = [{"role": "system", "content": instructions}, *messages]
    text_format = values.get("text", {}).get("format", {"type": "text"})
    nested = {"type": text_format["type"], "json_schema": text_format}
    limit = values.get("max_output_tokens")
    parsed = common(values, [[plain(message) for message in messages]], limit, None, None)
    repeated = {
        "instructions": instructions,
        "max_output_tokens": limit,
        "metadata": values.get("metadata", {}),
        "temperature": values.get("temperature", 1.0),
        "text": {"format": text_format},
        "top_p": values.get("top_p", 1.0),
        "user": values.get("user"),
    }
    return replace(parsed, json_schema=json_schema(nested), schema_name="text.format", repeated=repeated)


class ResponseWriter:
    """A writer of one response's objects, and of the events of its stream: response.created to response.completed.

    Source: https://platform.openai.com/docs/api-reference/responses-streaming
    """

    end = b""

    def __init__(self, model: str, repeated: dict[str, Any]):
        self.model, self.repeated = model, repeated
        self.id, self.item_id = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._text, self._num_events = "", 0

    def whole(self, replies: Sequence[tuple[Generation, list[Piece]]], everything: Sequence[Generation]) -> dict:
        """Return the object of a response that is not streamed."""
        [(generation, pieces)] = replies
        text = "".join(piece.text for piece in pieces)
        return self._response(_status(generation), [self._item(_status(generation), text)], everything)

    def opening(self, generations: Sequence[Generation]) -> bytes:
        """Return the beginning of a stream."""
        response = self._response("in_progress", [])
        return b"".join(
            [
                self._event("response.created", response=response),
                self._event("response.in_progress", response=response),
                self._event("response.output_item.added", output_index=0, item=self._item("in_progress")),
                self._event("response.content_part.added", **self._place(), part=_part("")),
            ]
        )

    def block(self, found: Sequence[tuple[int, Piece]], generations: Sequence[Generation]) -> bytes:
        """Return the event with the text that has come."""
        new = "".join(piece.text for _, piece in found)
        self._text += new
        return self._event("response.output_text.delta", **self._place(), delta=new, logprobs=[]) if new else b""

    def closing(self, generations: Sequence[Generation]) -> bytes:
        """Return the end of a stream."""
        status, text = _status(generations[0]), self._text
        item = self._item(status, text)
        return b"".join(
            [
                self._event("response.output_text.done", **self._place(), text=text, logprobs=[]),
                self._event("response.content_part.done", **self._place(), part=_part(text)),
                self._event("response.output_item.done", output_index=0, item=item),
                self._event(f"response.{status}", response=self._response(status, [item], generations)),
            ]
        )

    def failure(self, error: ApiError) -> bytes:
        """Return the end of a stream that failed."""
        response = self._response("failed", [])
        response["error"] = {"code": error.body["error"]["code"] or "server_error", "message": str(error)}
        return self._event("response.failed", response=response)

    def _event(self, kind: str, **content: Any) -> bytes:
        data = json.dumps({"type": kind, "sequence_number": self._num_events, **content})
        self._num_events += 1
        return f"event: {kind}\ndata: {data}\n\n".encode()

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.item_id, "output_index": 0, "content_index": 0}

    def _item(self, status: str, text: str | None = None) -> dict[str, Any]:
        content = [] if text is None else [_part(text)]
        return {"id": self.item_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def _response(self, status: str, output: list, generations: Sequence[Generation] = ()) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self.model,
            "output": output,
            "usage": _usage(generations) if generations else None,
            "store": False,
            "previous_response_id": None,
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "truncation": "disabled",
            **self.repeated,
        }


def _status(generation: Generation) -> str:
    return "incomplete" if generation.finish_reason == "length" else "completed"


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(generations: Sequence[Generation]) -> dict[str, Any]:
    """Return the numbers of tokens of a reply by the names of this API."""
    counts = usage(generations)
    return {
        "input_tokens": counts["prompt_tokens"],
        "input_tokens_details": counts["prompt_tokens_details"],
        "output_tokens": counts["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": counts["total_tokens"],
    }

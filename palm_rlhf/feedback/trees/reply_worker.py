"""A thread that gives the model's replies in trees, while people grow them."""

import logging
import threading
from typing import Any

from beartype import beartype

from palm_rlhf.feedback.settings import CollectionSettings
from palm_rlhf.feedback.store.database import Store, StoreError
from palm_rlhf.feedback.store.table_base import utc_now
from palm_rlhf.feedback.trees.model_replies import ReplyWanted, add_model_reply, messages_wanting_model_replies
from palm_rlhf.ops.sampling import Sampling
from palm_rlhf.serving.engine import Engine
from palm_rlhf.serving.generation import EngineError, EngineFull, Generation, Request
from palm_rlhf.serving.served_model import ServedModel

logger = logging.getLogger(__name__)
POLL_SECONDS = 1.0  # between two looks into the database for messages that want a reply


class ReplyWorker:
    """A thread that generates the replies that trees want of a model; use it as a context manager, or `close` it.

    The replies to one message are different samples, by the number of each. A process that stops in between loses at
    most replies that nobody has seen: the next worker generates the same ones, as the seed is the same.
    """

    @beartype
    def __init__(
        self,
        store: Store,
        model: ServedModel,
        engine: Engine,
        settings: CollectionSettings,
        *,
        model_id: str,
        sampling: Sampling = Sampling(),  # noqa: B008 (it is frozen)
        max_new_tokens: int = 256,
        seed: int = 0,
    ):
        """Start the thread.

        Args:
            store: The database of the trees.
            model: The model that replies.
            engine: The engine of the model.
            settings: The settings of the collection.
            model_id: The id of the model in the database, a `KnownModel`.
            sampling: The options by which replies are sampled.
            max_new_tokens: The most tokens of a reply.
            seed: The seed of the samples.
        """
        self.store, self.model, self.engine, self.settings = store, model, engine, settings
        self.model_id, self.sampling, self.max_new_tokens, self.seed = model_id, sampling, max_new_tokens, seed
        self._running: list[Generation] = []
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="palm-rlhf-replies", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread; replies that are being generated are dropped."""
        self._closed.set()
        for generation in tuple(self._running):
            generation.cancel()
        self._thread.join()

    def __enter__(self) -> "ReplyWorker":
        """Return the worker itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the thread."""
        self.close()

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                num_added = self._give_replies()
            except (EngineError, EngineFull, StoreError) as error:
                if not self._closed.is_set():
                    logger.warning("a reply of the model for the trees has to wait: %s", error)
                num_added = 0
            except Exception:
                logger.exception("a reply of the model for the trees failed; it is tried again")
                num_added = 0
            if not num_added:
                self._closed.wait(POLL_SECONDS)

    def _give_replies(self) -> int:
        """Generate the replies to the first message that wants some, and return how many were added."""
        with self.store.reading() as session:
            wanted = messages_wanting_model_replies(session, self.settings, now=utc_now())
        return self._reply(wanted[0]) if wanted else 0

    def _reply(self, wanted: ReplyWanted) -> int:
        try:
            prompt = self.model.encode_chat(wanted.conversation)
        except ValueError as error:  # which will not change: the tree goes on without this reply
            return self._add(wanted, "", {"refused": str(error)})
        room = min(self.max_new_tokens, self.engine.context - len(prompt))
        if room < 1:
            reason = f"the conversation has {len(prompt)} tokens, and the context {self.engine.context}"
            return self._add(wanted, "", {"refused": reason})
        numbers = range(wanted.num_tries, wanted.num_tries + wanted.number)
        requests = [self._request(prompt, room, number) for number in numbers]
        self._running = self.engine.submit_all(requests)
        num_added = 0
        for request, generation in zip(requests, self._running):
            if self._closed.is_set():  # `close` may have looked before there was anything to cancel
                generation.cancel()
            text = generation.text()
            if self._closed.is_set():
                continue
            sampling = {**self.sampling.options, "max_new_tokens": room, "seed": self.seed, "index": request.index}
            num_added += self._add(wanted, text, {**sampling, "finish": generation.finish_reason})
        return num_added

    def _add(self, wanted: ReplyWanted, text: str, sampling: dict[str, Any]) -> int:
        with self.store.writing() as session:
            reply = add_model_reply(
                session,
                wanted.message_id,
                text,
                model_id=self.model_id,
                sampling=sampling,
                settings=self.settings,
                now=utc_now(),
            )
        return int(reply is not None)

    def _request(self, prompt: list[int], max_new_tokens: int, number: int) -> Request:
        return Request(
            prompt,
            max_new_tokens,
            seed=self.seed,
            index=number,
            stop=self.model.turn_end_strings,
            stop_tokens=self.model.turn_ends,
            **self.sampling.options,
        )

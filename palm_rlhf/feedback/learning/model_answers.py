"""Answers of models to the prompts of a round: the pool that people compare, and the answers of two models."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from beartype import beartype
from sqlalchemy import select

from palm_rlhf.data.conversation import encode_prompt, encode_response
from palm_rlhf.feedback.learning.round_context import RoundContext, end_of_answer, template_of
from palm_rlhf.feedback.learning.round_prompts import RoundPrompt, encoded
from palm_rlhf.feedback.store.answer_tables import Answer, AnswerScore
from palm_rlhf.feedback.store.table_base import new_id
from palm_rlhf.model.token_ids import known_tokens
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.policy.rollout import collect
from palm_rlhf.policy.sequences import join
from palm_rlhf.serving.served_model import ServedModel

AT_ONCE = 16  # prompts whose answers are drawn, and written, together
REDRAWS = 3  # of two models' answers to a prompt, while they are of the same text


class DrawnAnswer(NamedTuple):
    """The text of an answer, and why it ended: stop, or length where there was no more room."""

    text: str
    finish: str


class Scorer(NamedTuple):
    """The reward model of an earlier round, by its row."""

    round_id: str
    reward_model: RewardModel


@beartype
def draw(
    context: RoundContext, model: ServedModel, prompts: Sequence[RoundPrompt], num_samples: int, seed: str
) -> list[list[DrawnAnswer]]:
    """Return answers of a model to each prompt; `seed` and the round's settings decide the random numbers."""
    sampling = context.settings.sampling(end_of_answer(model))
    generator = torch.Generator(model.palm.device).manual_seed(_number(f"{context.settings.seed} {seed}"))
    rollout = collect(
        model.palm,
        encoded(prompts, model),
        sampling.restricted_to(known_tokens(model.tokenizer, model.palm.num_tokens)),
        num_samples=num_samples,
        generator=generator,
    )
    lengths, cut = rollout.sequences.response_lengths.tolist(), rollout.truncated.tolist()
    drawn = []
    for row, length, is_cut in zip(rollout.sequences.responses.tolist(), lengths, cut, strict=True):
        tokens = row[: length if is_cut else length - 1]
        text = model.tokenizer.decode(tokens).replace("\0", "\ufffd")  # PostgreSQL keeps no null characters
        drawn.append(DrawnAnswer(text, "length" if is_cut else "stop"))
    return [drawn[first : first + num_samples] for first in range(0, len(drawn), num_samples)]


def _number(seed: str) -> int:
    return int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big")


@beartype
def fill_pool(
    context: RoundContext, model: ServedModel, prompts: Sequence[RoundPrompt], scorer: Scorer | None = None
) -> dict[str, Any]:
    """Write answers of a model to the prompts of the pool, with scores where there is a scorer; return the figures.

    The answers to some prompts are written at once, and prompts that have their answers are left alone.
    """
    pool = [prompt for prompt in prompts if prompt.in_pool]
    done = _answered(context, "training")
    for first in range(0, len(pool), AT_ONCE):
        part = pool[first : first + AT_ONCE]
        if part[0].key in done:
            continue
        drawn = draw(context, model, part, context.settings.num_answers, f"pool {context.number} {first}")
        rows = [
            _row(context, prompt, answer, context.base_id, "training")
            for prompt, answers in zip(part, drawn, strict=True)
            for answer in {answer.text.strip(): answer for answer in answers}.values()
        ]
        scores = [] if scorer is None else _scores(scorer, model, rows)
        with context.store.writing() as session:
            session.add_all(rows)
            session.flush()
            session.add_all(
                AnswerScore(answer_id=row.id, round_id=scorer.round_id, score=score)
                for row, score in zip(rows, scores, strict=False)
                if scorer is not None
            )
        context.say(f"answered {first + len(part)} of {len(pool)} prompts")
    with context.store.reading() as session:
        own = Answer.purpose == "training", Answer.round_id == context.round_id
        number = len(session.scalars(select(Answer.id).where(*own)).all())
    return {"prompts": len(pool), "answers": number, "scored": scorer is not None}


@beartype
def compare(context: RoundContext, models: Mapping[str, ServedModel], prompts: Sequence[RoundPrompt]) -> dict[str, Any]:
    """Write an answer of each of two models to the prompts of the evaluation; return the figures.

    Both are drawn with the same sampling. Answers of the same text are drawn again, and after some attempts the prompt
    is left out, since nobody can compare them.

    Args:
        context: The round.
        models: The two models by their ids.
        prompts: The prompts of the round.
    """
    asked = [prompt for prompt in prompts if prompt.in_evaluation]
    ids = list(models)
    done = _answered(context, "evaluation")
    for first in range(0, len(asked), AT_ONCE):
        part = asked[first : first + AT_ONCE]
        if any(prompt.key in done for prompt in part):
            continue
        rows: list[Answer] = []
        for attempt in range(1 + REDRAWS):
            seed = f"comparison {context.number} {first} {attempt}"
            drawn = [draw(context, model, part, 1, f"{seed} {place}") for place, model in enumerate(models.values())]
            same = []
            for prompt, *answers in zip(part, *drawn, strict=True):
                texts = {answer.text.strip() for (answer,) in answers}
                if len(texts) < len(answers):
                    same.append(prompt)
                    continue
                pairs = zip(ids, answers, strict=True)
                rows += [_row(context, prompt, answer, each, "evaluation") for each, (answer,) in pairs]
            part = same
            if not part:
                break
        with context.store.writing() as session:
            session.add_all(rows)
    done = _answered(context, "evaluation")
    return {"prompts": sum(prompt.key in done for prompt in asked), "models": ids}


def _answered(context: RoundContext, purpose: str) -> set[str]:
    """Return the keys of the prompts that have answers of this purpose in the round."""
    chosen = Answer.purpose == purpose, Answer.round_id == context.round_id
    with context.store.reading() as session:
        return set(session.scalars(select(Answer.prompt_key).where(*chosen)))


def _row(context: RoundContext, prompt: RoundPrompt, answer: DrawnAnswer, model_id: str, purpose: str) -> Answer:
    settings = context.settings
    sampling = {name: getattr(settings, name) for name in ("temperature", "top_p", "max_new_tokens", "seed")}
    return Answer(
        id=new_id(),
        prompt_key=prompt.key,
        prompt=prompt.prompt,
        text=answer.text,
        finish=answer.finish,
        model_id=model_id,
        sampling=sampling,
        purpose=purpose,
        round_id=context.round_id,
    )


def _scores(scorer: Scorer, model: ServedModel, rows: Sequence[Answer]) -> list[float]:
    tokenizer, template = model.tokenizer, template_of(model)
    prompts = [encode_prompt(row.prompt, tokenizer, template) for row in rows]
    answers = [encode_response(row.prompt, row.text, tokenizer, template) for row in rows]
    return scorer.reward_model.score(join(prompts, answers)).tolist()

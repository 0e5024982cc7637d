"""The reward stage of a round: a reward model fitted to all preferences, and measured on held-out votes.

It starts from the model that wrote the newest answers, and not from the reward model of the round before. That model
has read the words that the next policy will say, and the critic of PPO starts from the same weights as the policy. The
preferences of all rounds are learnt again, so nothing is lost, and no order of rounds weighs more than another.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from beartype import beartype

from palm_rlhf.algorithms.win_rate import wilson_interval
from palm_rlhf.data.conversation import encode_prompt, encode_response
from palm_rlhf.data.preferences.ranking_files import fit_rankings
from palm_rlhf.feedback.learning.round_context import REWARD, RoundContext, save_whole, template_of
from palm_rlhf.feedback.learning.training_preferences import LearntPreference, read_preferences
from palm_rlhf.model.local_model import MODEL
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.policy.sequences import join
from palm_rlhf.serving.served_model import ServedModel
from palm_rlhf.training.ranked_data import Ranking
from palm_rlhf.training.reward import RewardModelTrainer
from palm_rlhf.training.reward_metrics import correctness, effective_count


class Accuracy(NamedTuple):
    """The share of pairs that a reward model orders as people did, with its 95% interval; None without a pair."""

    accuracy: float | None
    low: float | None
    high: float | None
    num_pairs: int


@beartype
def encode_rankings(
    preferences: Sequence[LearntPreference], model: ServedModel, max_seq_len: int, weights: dict[str, float]
) -> list[Ranking]:
    """Return preferences as rankings of tokens, with weights by their origin.

    Preferences of weight 0 are left out, and so are those that the chat template does not write, and those that are
    equal within `max_seq_len`.
    """
    tokenizer, template = model.tokenizer, template_of(model)
    rankings = []
    for each in preferences:
        if not weights[each.origin]:
            continue
        with suppress(ValueError):  # of messages that the template does not write, such as those of tools
            prompt = encode_prompt(each.prompt, tokenizer, template)
            responses = [encode_response(each.prompt, text, tokenizer, template) for text in each.responses]
            rankings.append(Ranking(prompt, responses, weight=weights[each.origin]))
    return list(fit_rankings(rankings, max_seq_len))


@beartype
def fit_reward_model(context: RoundContext) -> dict[str, Any]:
    """Train the reward model of a round, or go on with its training; save it, and return the figures."""
    settings, run = context.settings, context.folder / REWARD
    preferences, base = read_preferences(context), context.open_base()
    learnt = [each for each in preferences if not each.held_out]
    train = encode_rankings(learnt, base, settings.max_seq_len, settings.weights)
    config = settings.reward_config(context.number)
    if not (run / MODEL).is_dir():
        context.say(f"fitting the reward model to {len(train)} of {len(learnt)} preferences")
        torch.manual_seed(config.seed)  # of the head, which is the same in a resumed run
        trainer = RewardModelTrainer(
            RewardModel(base.palm, pooling=settings.pooling),
            train_data=train,
            config=config,
            output_dir=run,
            resume=True,
        )
        trainer.train()
        # A process killed after the normalisation normalises again: from the same scores, for the same bits.
        trainer.reward_model.score_mean.zero_()
        trainer.reward_model.score_std.fill_(1.0)
        trainer.normalise(train)
        save_whole(run, trainer.reward_model, base)
    reward_model = context.open_reward_model()
    votes = [each for each in preferences if each.held_out and each.kind == "comparison"]
    at_random = measure(reward_model, [vote for vote in votes if vote.at_random], base, settings.max_seq_len)
    on_all = measure(reward_model, votes, base, settings.max_seq_len)
    origins = {name: sum(each.origin == name for each in learnt) for name in settings.weights}
    pairs = sum(ranking.num_pairs for ranking in train)
    figures = {"rankings": len(train), **origins, "pairs": pairs, **at_random._asdict()}
    return {**figures, "accuracy_all": on_all.accuracy, "num_pairs_all": on_all.num_pairs}


@beartype
def measure(
    reward_model: RewardModel, votes: Sequence[LearntPreference], model: ServedModel, max_seq_len: int
) -> Accuracy:
    """Return the accuracy of a reward model on votes. Its interval is Wilson's, with the prompts as clusters."""
    rankings = encode_rankings(votes, model, max_seq_len, dict.fromkeys({vote.origin for vote in votes}, 1.0))
    if not rankings:
        return Accuracy(None, None, None, 0)
    rows = [(ranking.prompt, response) for ranking in rankings for response in ranking.responses]
    scores = reward_model.score(join(*zip(*rows, strict=True)), raw=True).cpu().double()
    correct = correctness(scores[0::2] - scores[1::2])
    number = {key: place for place, key in enumerate(dict.fromkeys(map(_key, rankings)))}
    clusters = torch.tensor([number[_key(ranking)] for ranking in rankings])
    share = float(correct.mean())
    return Accuracy(share, *wilson_interval(share, effective_count(correct, clusters)), len(rankings))


def _key(ranking: Ranking) -> tuple[int, ...]:
    return tuple(ranking.prompt.tolist())

"""Judges that are models of ours: a PaLM, and a RewardModel."""

from itertools import takewhile
from typing import cast

import torch
from beartype import beartype
from torch import Tensor

from palm_rlhf.data.conversation import Template, encode_prompt, encode_response, end_of_turn
from palm_rlhf.data.tokenizer import Tokenizer
from palm_rlhf.evaluation.judging.answers import Question, Turns
from palm_rlhf.evaluation.judging.judges import Judge, JudgeReply, JudgeRequest
from palm_rlhf.model.palm import PaLM
from palm_rlhf.model.token_ids import known_tokens
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.policy.sequences import join


class LocalJudge(Judge):
    """A PaLM as the judge. Its samples have different seeds, which are the same in every run.

    Args:
        palm: The model.
        tokenizer: Its tokenizer.
        template: Its chat template.
        name: The name of the judge.
        temperature: Sampling temperature.
        max_tokens: Longest judgment, in tokens.
        version: An identifier of the weights, which separates judgments of different weights under one name.
    """

    max_concurrency = 1

    @beartype
    def __init__(
        self,
        palm: PaLM,
        tokenizer: Tokenizer,
        template: Template,
        *,
        name: str = "palm",
        temperature: float | int = 0.0,
        max_tokens: int = 1024,
        version: str = "",
    ):
        self.palm, self.tokenizer, self.template, self.name = palm, tokenizer, template, name
        self.identity = {"model": name, "temperature": float(temperature), "max_tokens": max_tokens, "version": version}
        self._allowed_tokens = known_tokens(tokenizer, palm.num_tokens)

    def __call__(self, request: JudgeRequest) -> JudgeReply:
        end = end_of_turn(self.tokenizer, self.template)
        prompt = encode_prompt(request.messages, self.tokenizer, self.template).to(self.palm.device)
        seed = int(request.key(self)[:15], 16)
        generated = self.palm.generate(
            prompt=prompt,
            max_new_tokens=self.identity["max_tokens"],
            temperature=self.identity["temperature"],
            eos_token=end,
            allowed_tokens=self._allowed_tokens,
            generator=torch.Generator(self.palm.device).manual_seed(seed),
        )
        response = cast(Tensor, generated).tolist()  # one prompt, one sample: `t`
        ends = {end, *self.tokenizer.eos_tokens}  # some models end a reply in more than one way
        response = list(takewhile(lambda token: token not in ends, response))
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(response)}
        return JudgeReply(self.tokenizer.decode(response), usage=usage)


class RewardJudge(Judge):
    """A RewardModel as the judge. It scores each conversation alone, so order and sample make no difference.

    Args:
        reward_model: The model.
        tokenizer: Its tokenizer.
        template: Its chat template.
        name: The name of the judge.
        version: An identifier of the weights, which separates judgments of different weights under one name.
    """

    sees_order = False
    max_concurrency = 1

    @beartype
    def __init__(
        self,
        reward_model: RewardModel,
        tokenizer: Tokenizer,
        template: Template,
        *,
        name: str = "reward",
        version: str = "",
    ):
        self.reward_model, self.tokenizer, self.template, self.name = reward_model, tokenizer, template, name
        self.identity = {"reward_model": name, "version": version}

    def __call__(self, request: JudgeRequest) -> JudgeReply:
        return JudgeReply(scores=[self.score(request.question, reply, request.turn) for reply in request.replies])

    @beartype
    def score(self, question: Question, reply: Turns, turn: int = 1) -> float:
        """Return the score of the answer to a turn, after all turns before it."""
        messages = [{"role": "user", "content": question.turns[0]}]
        for asked, answered in zip(question.turns[1:turn], reply):
            messages += [{"role": "assistant", "content": answered}, {"role": "user", "content": asked}]
        prompt = encode_prompt(messages, self.tokenizer, self.template)
        response = encode_response(messages, reply[turn - 1], self.tokenizer, self.template)
        return float(self.reward_model.score(join([prompt], [response])))

"""The policy stage of a round: PPO against its reward model, and the new model in the database.

The KL is measured to the model that the round began with, and not to the first model. The reward model knows answers of
the model that the round began with, and is right near them. A KL to the first model would hold later rounds back where
the first one had arrived.
"""

from typing import Any

import torch
from beartype import beartype

from palm_rlhf.feedback.learning.round_context import POLICY, RoundContext, end_of_answer, save_whole
from palm_rlhf.feedback.learning.round_prompts import encoded, read_round_prompts
from palm_rlhf.feedback.store.identities import remember_model, weights_digest
from palm_rlhf.model.local_model import MODEL
from palm_rlhf.policy.actor_critic import ACTOR_SCOPE
from palm_rlhf.training.rlhf.trainer import RLHFTrainer
from palm_rlhf.training.run.checkpoints import METRICS_FILE
from palm_rlhf.training.run.log import read_metrics


@beartype
def improve_policy(context: RoundContext) -> dict[str, Any]:
    """Train the policy of a round by PPO, or go on with its training; save it, and return the figures.

    Raises ValueError if all prompts are held out.
    """
    run = context.folder / POLICY
    if not (run / MODEL).is_dir():
        prompts = [prompt for prompt in read_round_prompts(context) if not prompt.held_out]
        if not prompts:
            raise ValueError("got held-out prompts only, expected others to train on: give more prompts by --prompts")
        base, reward_model = context.open_base(), context.open_reward_model()
        config = context.settings.ppo_config(context.number, end_of_answer(base))
        context.say(f"improving the model by PPO on {len(prompts)} prompts")
        torch.manual_seed(config.seed)
        trainer = RLHFTrainer(
            palm=base.palm,
            reward_model=reward_model,
            critic=reward_model,
            prompts=encoded(prompts, base),
            tokenizer=base.tokenizer,
            config=config,
            output_dir=run,
            resume=True,
        )
        trainer.train()
        if config.actor_lora_r:
            base.palm.merge_finetune_params(ACTOR_SCOPE)
        save_whole(run, base.palm, base)
    lines = read_metrics(run / METRICS_FILE)
    return {
        "steps": [line["step"] for line in lines],
        "score": [line["score"] for line in lines],
        "kl": [line.get("kl") for line in lines],
    }


@beartype
def register_policy(context: RoundContext) -> dict[str, Any]:
    """Write the model that a round has trained to the database; return the figures."""
    model_id = weights_digest(context.open_policy().palm)
    folder = (context.folder / POLICY / MODEL).resolve()
    with context.store.writing() as session:
        remember_model(session, model_id, f"round {context.number}", folder)
    return {"model": model_id, "folder": str(folder)}

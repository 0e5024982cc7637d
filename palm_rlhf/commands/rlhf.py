"""The command ``palm-rlhf rlhf``: a model improved by rewards, with PPO, GRPO or RLOO."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
from beartype import beartype
from tyro.conf import OmitArgPrefixes, Positional, arg

from palm_rlhf.commands.reward_arguments import MAIN, open_rewards, read_environment
from palm_rlhf.commands.run_folder import finish, quoted, run_folder, save_model, say
from palm_rlhf.commands.start_models import ModelName, TemplateName, open_chat_model
from palm_rlhf.commands.training_data import read_prompt_rows
from palm_rlhf.data.conversation import end_of_turn
from palm_rlhf.policy.actor_critic import ACTOR_SCOPE
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.training.rlhf.config import PPOConfig
from palm_rlhf.training.rlhf.trainer import RLHFTrainer
from palm_rlhf.training.run.checkpoints import best_checkpoint
from palm_rlhf.training.run.sharding import full_state, plain_palm


@beartype
def rlhf(
    prompts: Annotated[Positional[Path], arg(metavar="PROMPTS")],
    *,
    model: ModelName,
    reward_model: Annotated[str | None, arg(metavar="MODEL")] = None,
    rewards: Annotated[tuple[str, ...], arg(metavar="NAME=SOURCE ...")] = (),
    environment: Annotated[str | None, arg(metavar="FILE.py:FUNCTION")] = None,
    eval_prompts: Annotated[Path | None, arg(metavar="FILE")] = None,
    eval_rewards: Annotated[tuple[str, ...], arg(metavar="NAME=SOURCE ...")] = (),
    output_dir: Annotated[Path | None, arg(metavar="FOLDER")] = None,
    resume: bool = False,
    template: TemplateName = "auto",
    training: OmitArgPrefixes[PPOConfig] = PPOConfig(),  # noqa: B008 (it is frozen)
) -> None:
    """Improve a model by reinforcement learning from rewards, models or functions: PPO, GRPO or RLOO (--algorithm).

    With PPO the critic starts from the reward model, unless --shared-trunk reads values from the policy. Adapters
    (--actor-lora-r) are merged at the end. The last line on standard output is JSON: the metrics of the last step,
    such as score and kl, output_dir and model.

    Args:
        prompts: A text with a prompt on each line (.txt), or records of any form that `palm-rlhf data convert` reads;
            where functions reward rows with a prompt or a question, they get the other fields.
        model: The model to improve, fine-tuned on conversations: its folder, that of a run, or a hub id.
        reward_model: A reward model, of the same tokenizer: its folder, that of a run, or a hub id.
        rewards: Rewards with a name each, beside reward_model or in its place: functions as NAME=FILE.py:FUNCTION,
            reward models as NAME=FOLDER. --reward-weights has their weights, and that of reward_model by this name.
        environment: A function that answers the model's turns, such as a tool: of the messages so far, and of what
            other fields of a row it asks for by name. It returns the next message of the user, or None at the end.
        eval_prompts: Prompts to evaluate on every --eval-every steps, as PROMPTS; the best checkpoint is kept by it.
        eval_rewards: Rewards that only evaluations ask, as --rewards: the first of them tells the best checkpoint, and
            one that falls while the score rises is a reason for a warning.
        output_dir: Where model, tokenizer, template, checkpoints, metrics and samples go; a new folder in runs/ by
            default.
        resume: Go on from the newest checkpoint in output_dir; without that, of the newest run in runs/.
        template: How conversations are written; auto is the model's own, or default.
        training: How it is trained; where --eos-token is None it is the end of the assistant's turn.
    """
    output_dir = run_folder("rlhf", output_dir, resume)
    torch.manual_seed(training.seed)
    chat_model = open_chat_model(model, template)
    judges = open_rewards(reward_model, rewards, chat_model, model)
    if training.eos_token is None:
        training = replace(training, eos_token=end_of_turn(chat_model.tokenizer, chat_model.template))
    answers = None if environment is None else read_environment(environment, chat_model)
    eval_judges = open_rewards(None, eval_rewards, chat_model, model) if eval_rewards else {}
    asks_functions = any(not isinstance(judge, RewardModel) for judge in (*judges.values(), *eval_judges.values()))
    rows, eval_rows = (
        file and read_prompt_rows(file, chat_model, with_columns=asks_functions or answers is not None)
        for file in (prompts, eval_prompts)
    )
    has_critic = training.algorithm == "ppo" and not training.shared_trunk and not training.critic_lora_r
    trainer = RLHFTrainer(
        palm=chat_model.palm,
        reward_model=judges[MAIN] if judges.keys() == {MAIN} else judges,
        critic=judges.get(MAIN) if has_critic else None,
        prompts=rows,
        tokenizer=chat_model.tokenizer,
        environment=answers,
        eval_prompts=eval_rows,
        eval_reward=eval_judges or None,
        config=training,
        output_dir=output_dir,
        resume=resume,
    )
    say(f"{len(rows)} prompts; saved to {output_dir}")
    result = trainer.train()
    state = full_state(trainer.actor_critic.palm)
    if trainer.accelerator.is_main_process:
        palm = plain_palm(chat_model.palm, state)
        if training.actor_lora_r:
            palm.merge_finetune_params(ACTOR_SCOPE)
        save_model(output_dir, palm, chat_model.tokenizer, chat_model.template)
        sources = [] if reward_model is None else ["--reference", model, "--reward-model", reward_model]
        finish(result, output_dir, _next_commands(trainer, output_dir, sources))


def _next_commands(trainer: RLHFTrainer, output_dir: Path, sources: list[str]) -> list[tuple[str, str]]:
    """What can be done with what was made, (words, command) each; says where the best checkpoint is."""
    if best := trainer.evaluator and best_checkpoint(trainer.run.checkpoints):
        say(f"the best by {trainer.evaluator.best_metric} is {best / 'policy'}")
    folder = quoted(output_dir)
    commands = [("talk with it", f"palm-rlhf chat {folder}"), ("serve it", f"palm-rlhf serve {folder}")]
    if sources:
        commands += [("measure the run", f"palm-rlhf evaluate run {folder} {' '.join(map(quoted, sources))}")]
    return commands

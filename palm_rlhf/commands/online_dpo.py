"""The command ``palm-rlhf online-dpo``: a model trained on preferences between its own replies, told by rewards."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
from beartype import beartype
from tyro.conf import OmitArgPrefixes, Positional, arg

from palm_rlhf.commands.reward_arguments import MAIN, open_rewards
from palm_rlhf.commands.run_folder import finish, quoted, run_folder, save_model, say
from palm_rlhf.commands.start_models import ModelName, TemplateName, open_chat_model
from palm_rlhf.commands.training_data import read_prompt_rows, split_prompts
from palm_rlhf.data.conversation import end_of_turn
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.training.online_preference import OnlinePreferenceTrainer
from palm_rlhf.training.preference_config import PreferenceConfig
from palm_rlhf.training.preference_learner import SCOPE
from palm_rlhf.training.rollout_config import RolloutConfig


@beartype
def online_dpo(
    prompts: Annotated[Positional[Path], arg(metavar="PROMPTS")],
    *,
    model: ModelName,
    reward_model: Annotated[str | None, arg(metavar="MODEL")] = None,
    rewards: Annotated[tuple[str, ...], arg(metavar="NAME=SOURCE ...")] = (),
    output_dir: Annotated[Path | None, arg(metavar="FOLDER")] = None,
    resume: bool = False,
    template: TemplateName = "auto",
    held_out: Annotated[float, arg(metavar="0..1")] = 0.1,
    rollouts: OmitArgPrefixes[RolloutConfig] = RolloutConfig(),  # noqa: B008 (it is frozen)
    training: OmitArgPrefixes[PreferenceConfig] = PreferenceConfig(),  # noqa: B008
) -> None:
    """Improve a model by DPO, or another --loss of pairs, on its own replies, which rewards compare.

    In each step the model replies --num-samples times to each prompt, and the best and the worst reply make a pair.
    Adapters (--lora-r) are merged at the end. The last line on standard output is JSON: valid_score and the other
    measures of the replies to held-out prompts, steps, seconds, output_dir and model.

    Args:
        prompts: A text with a prompt on each line (.txt), or records of any form that `palm-rlhf data convert` reads;
            where functions reward rows with a prompt or a question, they get the other fields.
        model: The model to improve, fine-tuned on conversations: its folder, that of a run, or a hub id.
        reward_model: A reward model, of the same tokenizer: its folder, that of a run, or a hub id.
        rewards: Rewards with a name each, beside reward_model or in its place: functions as NAME=FILE.py:FUNCTION,
            reward models as NAME=FOLDER. --reward-weights has their weights, and that of reward_model by this name.
        output_dir: Where model, tokenizer, template, checkpoints, metrics and samples go; a new folder in runs/ by
            default.
        resume: Go on from the newest checkpoint in output_dir; without that, of the newest run in runs/.
        template: How conversations are written; auto is the model's own, or default.
        held_out: The share of prompts that is kept to measure with; 0 keeps none.
        rollouts: How replies are drawn; where --eos-token is None it is the end of the assistant's turn.
        training: How the model is trained; a pair is of a prompt, and kto is no loss of pairs.
    """
    output_dir = run_folder("online-dpo", output_dir, resume)
    torch.manual_seed(training.seed)
    chat_model = open_chat_model(model, template)
    judges = open_rewards(reward_model, rewards, chat_model, model)
    if rollouts.eos_token is None:
        rollouts = replace(rollouts, eos_token=end_of_turn(chat_model.tokenizer, chat_model.template))
    asks_functions = any(not isinstance(judge, RewardModel) for judge in judges.values())
    rows = read_prompt_rows(prompts, chat_model, with_columns=asks_functions)
    train, valid = split_prompts(rows, held_out, training.seed)
    trainer = OnlinePreferenceTrainer(
        chat_model.palm,
        reward_model=judges[MAIN] if judges.keys() == {MAIN} else judges,
        prompts=train,
        valid_prompts=valid or None,
        tokenizer=chat_model.tokenizer,
        config=training,
        rollouts=rollouts,
        output_dir=output_dir,
        resume=resume,
    )
    say(f"{len(train)} prompts, {len(valid)} held out; saved to {output_dir}")
    for metrics in trainer.steps(progress_bar=True):
        if "valid_score" in metrics:
            say(f"step {metrics['step']}: replies to held-out prompts score {metrics['valid_score']:.3f}")
    result = trainer.finish()
    if training.lora_r:
        chat_model.palm.merge_finetune_params(SCOPE)
    if trainer.accelerator.is_main_process:
        save_model(output_dir, *chat_model)
        folder = quoted(output_dir)
        finish(
            result,
            output_dir,
            [("talk with it", f"palm-rlhf chat {folder}"), ("serve it", f"palm-rlhf serve {folder}")],
        )

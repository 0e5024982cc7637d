"""The command ``palm-rlhf rlhf``: improve a model by PPO, GRPO or RLOO."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
from beartype import beartype
from tyro.conf import OmitArgPrefixes, Positional, arg

from palm_rlhf.commands.adapter_output import base_for_adapters, parts_to_save, refuse_other_kind
from palm_rlhf.commands.reward_arguments import MAIN, has_functions, open_rewards, read_environment, without_name
from palm_rlhf.commands.run_folder import Saved, finish_chat_model, quoted, run_folder, say
from palm_rlhf.commands.start_models import ChatModel, ModelName, TemplateName, open_chat_model, quantize_base
from palm_rlhf.commands.training_data import read_prompt_rows
from palm_rlhf.model.quantised.quantised_weights import Quantisation
from palm_rlhf.policy.actor_critic import ACTOR_SCOPE
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.training.rlhf.config import PPOConfig
from palm_rlhf.training.rlhf.sample_table import SAMPLES_FILE
from palm_rlhf.training.rlhf.trainer import RLHFTrainer
from palm_rlhf.training.run.checkpoints import best_checkpoint
from palm_rlhf.training.run.log import read_metrics
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
    quantize: Quantisation | None = None,
    merge: bool = True,
    training: OmitArgPrefixes[PPOConfig] = PPOConfig(),  # noqa: B008 (it is frozen)
) -> None:
    """Improve a model by reinforcement learning from rewards, models or functions: PPO, GRPO or RLOO (--algorithm).

    With PPO the critic starts from the reward model, unless --shared-trunk reads values from the policy. Adapters
    (--actor-lora-r) are merged at the end, or saved alone (--no-merge). With --share-base the weights are in memory
    once, and reward models are those that `palm-rlhf reward --lora-r` trained on the same model; those of
    evaluations (--eval-rewards) have their own. The last line on standard output is JSON: the metrics of the last step,
    such as score and kl, output_dir and model.

    Args:
        prompts: A text file with a prompt on each line (.txt), or records in any format that `palm-rlhf data convert`
            reads. Reward functions get the other fields of records with a prompt or a question.
        model: The model to improve, fine-tuned on conversations: its folder or .gguf file, the folder of a run, a hub
            id, or smollm2.
        reward_model: A reward model with the same tokenizer: its folder, the folder of a run, or a hub id.
        rewards: Named rewards, beside reward_model or in its place: functions as NAME=FILE.py:FUNCTION, reward models
            as NAME=FOLDER. --reward-weights sets their weights, and the weight of reward_model under this name.
        environment: A function that answers the model's turns, such as a tool. It gets the messages so far and the
            fields of the prompt's record that its signature names, and returns the next message of the user, or None to
            end the conversation.
        eval_prompts: Prompts to evaluate on every --eval-every steps, as PROMPTS; the evaluation selects the best
            checkpoint.
        eval_rewards: Rewards for evaluation only, as --rewards. The first one selects the best checkpoint; a warning
            is logged if one falls while the score rises.
        output_dir: Folder of the model, tokenizer, template, checkpoints, metrics and samples; by default a new one in
            runs/.
        resume: Continue from the newest checkpoint in output_dir; without output_dir, from the newest run in runs/.
        template: The chat template; auto is the model's own, or default.
        quantize: Keep the frozen matrices below the adapters in int8, a byte a weight, or int4, 4.5 bits a weight
            (NF4), by bitsandbytes. The model that is saved has plain weights, with the adapters merged.
        merge: Save the whole model, with the adapters merged; else the adapters alone, as a folder of PEFT that names
            MODEL as its base.
        training: Training settings; if --eos-token is None, the end of the assistant's turn ends a response.
    """
    output_dir = run_folder("rlhf", output_dir, resume)
    refuse_other_kind(output_dir, merge)
    torch.manual_seed(training.seed)
    chat_model = open_chat_model(model, template)
    quantize_base(chat_model.palm, quantize, training.actor_lora_r, "--actor-lora-r")
    base = None if merge else base_for_adapters(model, chat_model, training.actor_lora_r)
    judges = open_rewards(reward_model, rewards, chat_model, model, share_base=training.share_base)
    if training.eos_token is None:
        training = replace(training, eos_token=chat_model.end_of_turn)
    answers = None if environment is None else read_environment(environment, chat_model)
    eval_judges = open_rewards(None, eval_rewards, chat_model, model) if eval_rewards else {}
    with_columns = has_functions(judges) or has_functions(eval_judges) or answers is not None
    rows = read_prompt_rows(prompts, chat_model, with_columns=with_columns)
    eval_rows = None
    if eval_prompts is not None:
        eval_rows = read_prompt_rows(eval_prompts, chat_model, with_columns=with_columns)
    has_critic = training.algorithm == "ppo" and not training.shared_trunk and not training.critic_lora_r
    critic = judges.get(MAIN) if has_critic else None
    trainer = RLHFTrainer(
        palm=chat_model.palm,
        reward_model=without_name(judges),
        critic=critic if isinstance(critic, RewardModel) else None,
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
    parts = trained_policy(trainer, chat_model, base)
    if trainer.accelerator.is_main_process:
        if trainer.evaluator is not None and (best := best_checkpoint(trainer.run.checkpoints)):
            say(f"the best by {trainer.evaluator.best_metric} is {best / 'policy'}")
        more_commands = []
        if reward_model is not None and read_metrics(output_dir / SAMPLES_FILE):  # empty after a short run
            options = f"--reference {quoted(model)} --reward-model {quoted(reward_model)}"
            more_commands = [("measure the run", f"palm-rlhf evaluate run {quoted(output_dir)} {options}")]
        finish_chat_model(result, output_dir, parts, more_commands)


def trained_policy(trainer: RLHFTrainer, model: ChatModel, base: str | None) -> Sequence[Saved]:
    """Return the trained policy, of all shards, with tokenizer and template, to be saved. Every process has to call it.

    Without a base for adapters alone, the adapters are merged in place, without a second copy in memory: the trainer,
    its reference and reward models over the same base mean nothing afterwards.
    """
    state = full_state(trainer.actor_critic.palm)
    if not trainer.accelerator.is_main_process:
        return model
    policy = model._replace(palm=plain_palm(model.palm, state))
    return parts_to_save(policy, ACTOR_SCOPE, trainer.config.actor_lora_r, base)

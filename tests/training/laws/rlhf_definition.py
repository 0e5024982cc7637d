"""A step of reinforcement learning as the papers have it: a response after another, a token after another, no pads.

Everything is read from the config's fields here, as their help texts say; nothing is taken from `algorithms` or the
trainer. Numbers that a gradient flows through are float64 scalars of torch.
"""

import math
from statistics import mean, pstdev, stdev
from typing import NamedTuple

import torch
from torch import Tensor

MAX_K3 = 10  # nats; verl's bound (core_algos.py, kl_penalty)


class Said(NamedTuple):
    """What a model gives one action, and the entropy of the distribution that it is drawn from."""

    logprob: Tensor
    entropy: Tensor


def kept_tokens(logits: list[float], action: int, top_k: int | None, top_p: float | None) -> list[int]:
    """The tokens that truncation leaves: top-k, then the fewest of largest mass p; the action counts as left."""
    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    if top_k is not None:
        order = order[:top_k]
    if top_p is not None:
        masses = [math.exp(logits[token]) for token in order]
        total, before, left = sum(masses), 0.0, []
        for token, mass in zip(order, masses):
            if before / total < top_p:
                left.append(token)
            before += mass
        order = left
    return sorted({*order, action})


def policy_says(c, palm, prompt: Tensor, response: Tensor, scope: str | None = None) -> list[Said]:
    """Of each action, under the distribution that `c` samples from."""
    logits = palm(torch.cat((prompt, response))[None, :-1], finetune_scope=scope)[0].double() / c.temperature
    said = []
    for t, action in enumerate(response.tolist()):
        row = logits[len(prompt) - 1 + t]
        kept = row[kept_tokens(row.tolist(), action, c.top_k, c.top_p)]
        logprobs = kept - kept.exp().sum().log()
        said.append(Said(row[action] - kept.exp().sum().log(), -(logprobs.exp() * logprobs).sum()))
    return said


def critic_says(actor_critic, prompt: Tensor, response: Tensor) -> list[Tensor]:
    """The value before each action: of the critic's trunk, or of the policy's where it is shared."""
    shared = actor_critic.critic is None
    trunk, scope = (actor_critic.palm, "actor") if shared else (actor_critic.critic, "critic")
    scope = scope if scope in trunk.finetune_modules else None
    tokens = torch.cat((prompt, response))[None, :-1]
    embeds = trunk(tokens, return_only_embedding=True, finetune_scope=scope)[0, len(prompt) - 1 :]
    head = actor_critic.value_head
    return [(embed * head.weight[0]).sum() + head.bias[0] for embed in embeds]


def kl_in_loss(c) -> bool:
    return c.kl_penalty == "loss" or (c.kl_penalty is None and c.algorithm == "grpo")


def shape(c, scores: list[float], truncated: list[bool], lengths: list[int]) -> list[float]:
    """Over the deviation of all scores so far, cut off, and less where the response is long or did not end."""
    scores = [score / pstdev(scores) for score in scores] if c.scale_scores else scores
    if c.score_clip is not None:
        scores = [min(max(score, -c.score_clip), c.score_clip) for score in scores]
    if c.overlong_buffer:  # DAPO, equation 13
        start = c.max_new_tokens - c.overlong_buffer
        rises = [max(length - start, 0) / c.overlong_buffer for length in lengths]
        scores = [score - c.overlong_penalty * rise for score, rise in zip(scores, rises)]
    return [score - c.missing_eos_penalty * cut for score, cut in zip(scores, truncated)]


def counts(c, scores: list[float], truncated: list[bool]) -> list[bool]:
    """The rows that the losses count, by the reward's own scores."""
    dapo = c.grpo_variant == "dapo"
    counted = []
    for row, cut in enumerate(truncated):
        first = row - row % c.num_samples
        equal = len(set(scores[first : first + c.num_samples])) == 1
        counted.append(not (c.mask_truncated and cut) and not (equal and (dapo or c.max_redraws)))
    return counted


class Credit(NamedTuple):
    """Of each row and token; `counted` are the rows that the losses count."""

    advantages: list[list[float]]
    returns: list[list[float]]
    counted: list[bool]


def credit(c, scores, counted, logprobs, ref_logprobs, values) -> Credit:
    """From shaped scores to advantages; the others are lists of lists of numbers."""
    beta = 0.0 if kl_in_loss(c) else c.kl_coef
    rewards = [[-beta * (new - ref) for new, ref in zip(*pair)] for pair in zip(logprobs, ref_logprobs)]
    for row, score in zip(rewards, scores):
        row[-1] += score
    if c.algorithm == "ppo":
        return ppo_credit(c, rewards, counted, values)
    totals, advantages = list(map(sum, rewards)), []
    scale = c.advantage_scale or ("none" if c.grpo_variant == "dr_grpo" else "group")
    for first in range(0, len(totals), c.num_samples):
        group = totals[first : first + c.num_samples]
        for place, total in enumerate(group):
            others = group[:place] + group[place + 1 :]
            advantage = total - mean(others if c.algorithm == "rloo" else group)
            if c.algorithm == "grpo" and scale != "none":
                advantage /= stdev(group if scale == "group" else totals) or 1.0
            advantages.append(advantage)
    spread = [[advantage] * len(row) for advantage, row in zip(advantages, rewards)]
    return Credit(spread, [[0.0] * len(row) for row in rewards], counted)


def ppo_credit(c, rewards, counted, values) -> Credit:
    """Schulman et al. 2015, equation 16, as the sum that it is; whitened over all tokens that count."""
    advantages = []
    for row, value in zip(rewards, values):
        following = [*value[1:], 0.0]
        errors = [r + c.gamma * after - v for r, v, after in zip(row, value, following)]
        advantages.append(
            [
                sum((c.gamma * c.gae_lambda) ** (later - t) * errors[later] for later in range(t, len(row)))
                for t in range(len(row))
            ]
        )
    returns = [[a + v for a, v in zip(*pair)] for pair in zip(advantages, values)]
    if c.whiten_advantages:
        every = [advantage for row, counts in zip(advantages, counted) if counts for advantage in row]
        advantages = [[(advantage - mean(every)) / pstdev(every) for advantage in row] for row in advantages]
    return Credit(advantages, returns, counted)


def ratio_level(c) -> str:
    """Whose ratio is clipped."""
    return c.ratio_level or {"rloo": "sequence"}.get(c.algorithm, "geometric" if c.grpo_variant == "gspo" else "token")


def aggregation(c) -> str:
    """What the losses of policy and KL are a mean over."""
    if c.loss_aggregation:
        return c.loss_aggregation
    if c.algorithm == "ppo" or (c.algorithm == "rloo" and ratio_level(c) == "token"):
        return "token"
    return {"dr_grpo": "constant", "dapo": "token", "cispo": "token"}.get(c.grpo_variant, "sequence")


def clip_bounds(c) -> tuple[float, float]:
    """The lowest and the highest ratio that is not clipped."""
    low = {"gspo": 3e-4, "cispo": 1.0}.get(c.grpo_variant, 0.2) if c.clip_eps is None else c.clip_eps
    high = {"dapo": 0.28, "gspo": 4e-4, "cispo": 4.0}.get(c.grpo_variant, low)
    return 1 - low, 1 + (high if c.clip_eps_high is None else c.clip_eps_high)


def token_weight(c, lengths: list[int], row: int, longest: int) -> float:
    """What a token of a row counts in the losses of policy and KL; `lengths` are of the rows that count."""
    kind = aggregation(c)
    if kind == "token":
        return 1 / sum(lengths)
    return 1 / (len(lengths) * (longest if kind == "constant" else row))


def step_loss(c, told: Credit, old, said, ref, old_values, values) -> tuple[Tensor, dict[str, float]]:
    """The loss of a step on all rows at once, and what is reported of it; `said` is a list of rows of Said."""
    rows = [index for index, counts in enumerate(told.counted) if counts]
    lengths, longest = [len(said[index]) for index in rows], c.max_new_tokens
    num_tokens, bounds, level = sum(lengths), clip_bounds(c), ratio_level(c)
    parts = {"policy_loss": [], "entropy": [], "clip_fraction": [], "approx_kl": [], "ratios": []}
    parts |= {"kl_loss": [], "value_loss": [], "value_clip_fraction": []}
    for index in rows:
        weight = token_weight(c, lengths, len(said[index]), longest)
        whole = sum(now.logprob - then for now, then in zip(said[index], old[index]))
        for t, now in enumerate(said[index]):
            moved = now.logprob - old[index][t]
            ratio = {"token": moved, "sequence": whole, "geometric": whole / len(said[index])}[level].exp()
            advantage = told.advantages[index][t]
            free, cut = -advantage * ratio, -advantage * ratio.clamp(*bounds)
            loss, is_clipped = torch.maximum(free, cut), cut.item() > free.item()
            if c.grpo_variant == "cispo":  # the weight is clipped, and a number
                loss = -min(max(ratio.item(), bounds[0]), bounds[1]) * advantage * now.logprob
                is_clipped = not bounds[0] <= ratio.item() <= bounds[1]
            parts["policy_loss"].append(weight * loss)
            parts["clip_fraction"].append(is_clipped / num_tokens)
            parts["approx_kl"].append((moved.exp() - 1 - moved).item() / num_tokens)
            parts["ratios"].append(ratio.item())
            parts["entropy"].append(now.entropy / num_tokens)
            d = now.logprob - ref[index][t]
            kl = d**2 / 2 if c.kl_estimator == "k2" else ((-d).exp() - 1 + d).clamp(max=MAX_K3)
            parts["kl_loss"].append(weight * kl)
            if c.algorithm == "ppo":
                new, before, target = values[index][t], old_values[index][t], told.returns[index][t]
                limit = math.inf if c.value_clip_eps is None else c.value_clip_eps
                near = new.clamp(before - limit, before + limit)
                free, cut = (new - target) ** 2, (near - target) ** 2
                parts["value_loss"].append(0.5 * torch.maximum(free, cut) / num_tokens)
                parts["value_clip_fraction"].append(float(cut.detach() > free.detach()) / num_tokens)
    ratios = parts.pop("ratios")
    sums = {name: sum(numbers) for name, numbers in parts.items()}
    loss = sums["policy_loss"] - c.entropy_coef * sums["entropy"]
    loss = loss + c.value_coef * sums["value_loss"] + kl_in_loss(c) * c.kl_coef * sums["kl_loss"]
    unused = [
        () if kl_in_loss(c) else ("kl_loss",),
        () if c.algorithm == "ppo" else ("value_loss", "value_clip_fraction"),
    ]
    metrics = {
        name: float(torch.as_tensor(value).detach()) for name, value in sums.items() if name not in sum(unused, ())
    }
    return loss, {**metrics, "ratio_min": min(ratios), "ratio_max": max(ratios)}

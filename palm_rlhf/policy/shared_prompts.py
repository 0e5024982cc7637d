"""Several responses to one prompt, read together: the prompt once, and each response after it.

The responses of a group (GRPO, RLOO) begin with the same prompt. Attention is causal, so the prompt's keys and values
do not depend on the response that follows. They are computed once, with their gradients, for all rows of the prompt.
"""

from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn

from palm_rlhf.model.block import Block
from palm_rlhf.model.cache import PromptCache
from palm_rlhf.model.palm import PaLM

if TYPE_CHECKING:
    from palm_rlhf.policy.sequences import Sequences

MAX_PART = 0.75  # of the tokens left to read; with more of them the second pass costs what sharing saves
MIN_SAVED = 1024  # tokens that need not be read


class Groups(NamedTuple):
    """The distinct prompts of the rows."""

    first: Tensor  # g, the first row of each prompt
    of_row: Tensor  # b, the number of each row's prompt


def embeds_before_actions(palm: PaLM, sequences: "Sequences", finetune_scope: str | None = None) -> Tensor:
    """Return the final embeddings at the token before each action: `b t e`.

    A prompt that several rows share is read once if that pays: if it saves at least `MIN_SAVED` tokens and a quarter of
    all. This is done in float32 or wider only. In narrower types the two ways round differently, and the probability
    ratio would not start at 1.
    """
    if can_share(palm):
        groups = find_groups(sequences)
        if pays(sequences, groups):
            return _read_prompts_once(palm, sequences, groups, finetune_scope)
    embeds = palm(
        sequences.tokens, key_mask=sequences.key_mask, return_only_embedding=True, finetune_scope=finetune_scope
    )
    return sequences.before_actions(embeds)


def can_share(palm: PaLM) -> bool:
    """Return whether rows may be read in two passes: not in narrow types, with dropout, recomputation or shards."""
    narrow = palm.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(palm.device.type)
    recomputes = palm.config.gradient_checkpointing and palm.training and torch.is_grad_enabled()
    drops = palm.training and any(part.p > 0 for part in palm.modules() if isinstance(part, nn.Dropout))
    block = cast(Block, palm.layers[0])
    whole = type(block.in_proj.weight) is nn.Parameter  # with shards, all processes must read equally often
    return whole and palm.config.causal and not (narrow or recomputes or drops or torch.compiler.is_compiling())


def find_groups(sequences: "Sequences") -> Groups:
    """Return which rows have the same prompt; they need not be next to each other."""
    width = int(sequences.prompt_lengths.max())
    tokens = sequences.tokens[:, :width].masked_fill(~sequences.prompt_mask[:, :width], -1)
    of_row = tokens.unique(dim=0, return_inverse=True)[1]
    rows = torch.arange(len(of_row), device=of_row.device)
    first = of_row.new_full((int(of_row.max()) + 1,), len(rows)).scatter_reduce(0, of_row, rows, "amin")
    return Groups(first, of_row)


def pays(sequences: "Sequences", groups: Groups) -> bool:
    """Return whether sharing saves enough tokens, padding included."""
    (num_rows, together), longest = sequences.tokens.shape, int(sequences.prompt_lengths.max())
    alone = len(groups.first) * longest + num_rows * (int(sequences.response_lengths.max()) - 1)
    saved = num_rows * together - alone
    return saved >= MIN_SAVED and alone <= MAX_PART * num_rows * together


def _read_prompts_once(palm: PaLM, sequences: "Sequences", groups: Groups, finetune_scope: str | None) -> Tensor:
    lengths = sequences.prompt_lengths[groups.first]
    left_padding = lengths.max() - lengths
    columns = torch.arange(int(lengths.max()), device=lengths.device) - left_padding.unsqueeze(-1)
    prompts = sequences.tokens[groups.first].gather(1, columns.clamp(min=0))
    cache = PromptCache(palm.config.depth, left_padding)
    options = {"cache": cache, "return_only_embedding": True, "finetune_scope": finetune_scope}
    embeds = palm(prompts, **options)[groups.of_row, -1:]
    inputs = sequences.responses[:, :-1]
    if inputs.shape[1]:
        cache.select(groups.of_row)
        embeds = torch.cat((embeds, palm(inputs, **options)), dim=1)
    return embeds

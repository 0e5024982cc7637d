"""Several responses to one prompt, read together: the prompt once, and each response after it.

The responses of a group (GRPO, RLOO) begin alike, and attention is causal: what the policy makes of a prompt does not
depend on what follows. Its keys and values, with their gradients, serve all rows that share it.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from palm_rlhf.model.cache import PromptCache
from palm_rlhf.model.palm import PaLM

if TYPE_CHECKING:
    from palm_rlhf.policy.sequences import Sequences

MAX_PART = 0.75  # of the tokens left to read, above which the second pass costs what the first saves
MIN_SAVED = 1024  # tokens


class Groups(NamedTuple):
    """The rows' prompts, each once."""

    first: Tensor  # g, a row that has it
    of_row: Tensor  # b, which of them a row has


def embeds_before_actions(palm: PaLM, sequences: "Sequences", finetune_scope: str | None = None) -> Tensor:
    """The final embeddings where each action is about to be said, `b t e`.

    Prompts that several rows share are read once where that pays: where at least `MIN_SAVED` tokens, and a quarter of
    all, need not be read. Only in float32 or wider: with less, one way does not round like the other, and the ratio of
    probabilities would not begin at 1.
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
    """Whether a palm may read rows in two passes: not where it rounds, drops out, computes again, or is in shards."""
    narrow = palm.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(palm.device.type)
    recomputes = palm.config.gradient_checkpointing and palm.training and torch.is_grad_enabled()
    drops = palm.training and any(part.p > 0 for part in palm.modules() if isinstance(part, nn.Dropout))
    whole = type(palm.layers[0].in_proj.weight) is nn.Parameter  # in shards, all read as often
    return whole and palm.config.causal and not (narrow or recomputes or drops or torch.compiler.is_compiling())


def find_groups(sequences: "Sequences") -> Groups:
    """Which rows have the same prompt, wherever they stand."""
    width = int(sequences.prompt_lengths.max())
    tokens = sequences.tokens[:, :width].masked_fill(~sequences.prompt_mask[:, :width], -1)
    of_row = tokens.unique(dim=0, return_inverse=True)[1]
    rows = torch.arange(len(of_row), device=of_row.device)
    first = of_row.new_full((int(of_row.max()) + 1,), len(rows)).scatter_reduce(0, of_row, rows, "amin")
    return Groups(first, of_row)


def pays(sequences: "Sequences", groups: Groups) -> bool:
    """Whether enough tokens, pads included, need not be read."""
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
    said = sequences.responses[:, :-1]
    if said.shape[1]:
        cache.select(groups.of_row)
        embeds = torch.cat((embeds, palm(said, **options)), dim=1)
    return embeds

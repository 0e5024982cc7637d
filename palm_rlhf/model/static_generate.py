"""Generation by steps of fixed shapes: the tokens of the loop in `generate.py`, on a GPU by replaying CUDA graphs.

The host queues steps and does not wait for their tokens. Every `CHECK_EVERY` steps it asks which responses go on, and
it reads the answer when it asks again: until then the device has work. Once at most half of the rows go on, they move
to the front, and the steps that follow compute fewer rows.

The random numbers of a step are drawn for all rows, ended or not. So the tokens of a row do not depend on when others
end, nor on when rows move; and a seeded generator gives the tokens of `generate.py` up to the step at which the first
response ends. Greedy tokens are always the same. (All this up to rounding: a GPU may add in another order where a step
has more rows or columns.) Rows move at the same steps in every run, which leaves the generator in the same state.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from palm_rlhf.model.captured import addresses
from palm_rlhf.model.decoding_step import static_logits
from palm_rlhf.model.lora import adapters_of
from palm_rlhf.model.prompts import PaddedPrompts, response_lengths
from palm_rlhf.model.static_cache import round_columns, round_rows
from palm_rlhf.model.step_memory import StepMemory, borrowed
from palm_rlhf.ops.sampling import Sampling

if TYPE_CHECKING:
    from palm_rlhf.model.palm import PaLM

CHECK_EVERY = 8  # steps


@torch.inference_mode(False)  # whose tensors could not be written to in a later call
@torch.no_grad()
def generate_static(
    palm: "PaLM",
    prompts: PaddedPrompts,
    limits: Tensor,
    sampling: Sampling,
    eos_token: int | None,
    allowed_tokens: Tensor | None,
    generator: torch.Generator | None,
    finetune_scope: str | None,
    use_tqdm: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the tokens of all responses and their log-probabilities, `b t` each; after its end, a response is filled.

    Args:
        palm: the model.
        prompts: the prompts.
        limits: `b`, the most tokens of each response; the responses to a prompt are neighbours.
        sampling: the distribution.
        eos_token: ends a response, and fills it.
        allowed_tokens: `v` bool, False for ids that are never sampled.
        generator: the random numbers.
        finetune_scope: the LoRA scope to apply.
        use_tqdm: show a progress bar.
    """
    most = int(limits.max())
    with borrowed(palm, len(limits), prompts.tokens.shape[1] + most) as memory:
        rows = StaticRows(palm, memory, prompts, limits, sampling, eos_token, allowed_tokens, generator, finetune_scope)
        waits = False
        for number in tqdm(range(1, most + 1), desc="generate", unit="tok", disable=not use_tqdm):
            rows.step()
            if number % CHECK_EVERY == 0:
                if waits and not rows.drop_ended():
                    break
                rows.ask()
                waits = True
        tokens, logprobs = rows.results()
    lengths = response_lengths(tokens, limits, eos_token)
    longest = int(lengths.max())
    ended = torch.arange(longest, device=lengths.device) >= lengths.unsqueeze(-1)
    fill = 0 if eos_token is None else eos_token
    return tokens[:, :longest].masked_fill(ended, fill), logprobs[:, :longest].masked_fill(ended, 0.0)


@torch.inference_mode(False)
@torch.no_grad()
def stream_static(
    palm: "PaLM",
    prompts: PaddedPrompts,
    limits: Tensor,
    sampling: Sampling,
    eos_token: int | None,
    allowed_tokens: Tensor | None,
    generator: torch.Generator | None,
    finetune_scope: str | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the tokens of a step and their log-probabilities, `b` each, until every response has ended."""
    most = int(limits.max())
    fill = 0 if eos_token is None else eos_token
    with borrowed(palm, len(limits), prompts.tokens.shape[1] + most) as memory:
        rows = StaticRows(palm, memory, prompts, limits, sampling, eos_token, allowed_tokens, generator, finetune_scope)
        for _ in range(most):
            ran = rows.running()
            rows.step()
            yield rows.newest(ran, fill)
            rows.ask()
            if not rows.drop_ended():
                return
            rows.find_weights()


class StaticRows:
    """The rows of one generation, which have read their prompts, in borrowed memory."""

    def __init__(
        self,
        palm: "PaLM",
        memory: StepMemory,
        prompts: PaddedPrompts,
        limits: Tensor,
        sampling: Sampling,
        eos_token: int | None,
        allowed_tokens: Tensor | None,
        generator: torch.Generator | None,
        finetune_scope: str | None,
    ):
        self.palm, self.memory, self.generator = palm, memory, generator
        self.options, self.scope = (sampling, eos_token, allowed_tokens is not None), finetune_scope
        self.find_weights()
        self.places = list(range(len(limits)))  # of the rows that are computed, among all rows
        self.size = round_rows(len(limits))  # of a step; rows beyond `places` fill it up
        self.sources: Tensor | None = None  # of the clocks of a step, among those of all rows, once rows have moved
        self.first_column, self.num_drawn = prompts.tokens.shape[1], 0
        self.all_clocks = memory.clocks[: len(limits)]

        cache = palm.make_cache(len(prompts.tokens), self.first_column, left_padding=prompts.left_padding)
        embeds = palm(prompts.tokens, cache=cache, return_only_embedding=True, finetune_scope=finetune_scope)
        copies = len(limits) // len(prompts.tokens)
        memory.cache.view(self.size, memory.cache.capacity).fill(cache, copies)
        memory.start(prompts, limits, sampling, allowed_tokens)
        self.prompt_logits: Tensor | None = palm.to_logits(embeds[:, -1]).repeat_interleave(copies, dim=0)
        self.tokens = memory.drawn.new_zeros(len(limits), int(limits.max()))
        self.logprobs = memory.drawn_logprobs.new_zeros(self.tokens.shape)

    def find_weights(self) -> None:
        """Look up the weights that steps read, at the start and whenever the caller may have replaced some."""
        self.adapters = None if self.scope is None else adapters_of(self.palm, self.scope)
        self.addresses = addresses(self.palm, self.adapters)
        self.matrices = self.memory.cast_matrices(self.palm)

    def step(self) -> None:
        """Draw the next token of every row that is computed."""
        self._draw_clocks()
        if self.prompt_logits is not None:
            self.memory.draw(self.prompt_logits, *self.options)
            self.prompt_logits = None
        else:
            columns = round_columns(self.first_column + self.num_drawn)

            def run() -> None:
                memory, tokens = self.memory, self.memory.tokens[: self.size]
                cache = memory.cache.view(self.size, columns)
                logits = static_logits(self.palm, tokens, cache, memory.lookup, self.adapters, self.matrices)
                memory.draw(logits, *self.options)

            self.memory.graphs.run((self.size, columns, self.options, self.addresses), run)
        self.num_drawn += 1

    def _draw_clocks(self) -> None:
        """Draw the random numbers of all rows, outside of the graph, from the generator of the caller."""
        if self.options[0].temperature == 0:
            return
        self.all_clocks.exponential_(generator=self.generator)
        if self.sources is not None:
            torch.index_select(self.all_clocks, 0, self.sources, out=self.memory.clocks[: self.size])

    def running(self) -> Tensor:
        """Return which of the rows that are computed go on: `r` bool."""
        return self.memory.running[: len(self.places)].clone()

    def newest(self, ran: Tensor, fill: int) -> tuple[Tensor, Tensor]:
        """Return the newest tokens of all rows and their log-probabilities, `b`; `fill` and 0 where a row had ended.

        ran: `r`, the `running` rows before the step.
        """
        rows, column = slice(len(self.places)), self.first_column + self.num_drawn - 1
        drawn = self.memory.drawn[rows, column].where(ran, fill)
        logprobs = self.memory.drawn_logprobs[rows, column].where(ran, 0.0)
        if len(self.places) == len(self.tokens):
            return drawn, logprobs
        places = self._on_device(self.places)
        return (
            drawn.new_full((len(self.tokens),), fill).index_copy_(0, places, drawn),
            logprobs.new_zeros(len(self.tokens)).index_copy_(0, places, logprobs),
        )

    def ask(self) -> None:
        """Begin to fetch which of the rows that are computed go on."""
        self.memory.fetch_running(len(self.places))

    def drop_ended(self) -> bool:
        """Wait for the answer to `ask`, drop rows that had ended if that makes steps smaller, and return if any go on.

        The rows are those that were computed when `ask` was called.
        """
        running = self.memory.fetched_running(len(self.places))
        kept = [row for row, goes_on in enumerate(running) if goes_on]
        if kept and 2 * len(kept) <= self.size and (size := 1 << (len(kept) - 1).bit_length()) < self.size:
            self._keep_drawn()
            filled = kept + kept[:1] * (size - len(kept))
            self.memory.select(self._on_device(filled))
            sources = [self.places[row] for row in filled]
            self.places = sources[: len(kept)]
            self.memory.running[len(kept) : size] = False
            if self.sources is None:
                self.all_clocks = torch.empty_like(self.all_clocks)
            self.size, self.sources = size, self._on_device(sources)
        return bool(kept)

    def results(self) -> tuple[Tensor, Tensor]:
        """Return all tokens drawn and their log-probabilities, `b t`; after the end of a response they mean nothing."""
        self._keep_drawn()
        return self.tokens, self.logprobs

    def _keep_drawn(self) -> None:
        """Copy the tokens of the rows that are computed from the memory."""
        rows, columns = slice(len(self.places)), slice(self.first_column, self.first_column + self.num_drawn)
        places, steps = self._on_device(self.places), slice(self.num_drawn)
        self.tokens[:, steps].index_copy_(0, places, self.memory.drawn[rows, columns])
        self.logprobs[:, steps].index_copy_(0, places, self.memory.drawn_logprobs[rows, columns])

    def _on_device(self, numbers: list[int]) -> Tensor:
        """Return integers as a tensor, which a GPU fetches without a wait of the host."""
        device = self.memory.clocks.device
        tensor = torch.tensor(numbers, device="cpu")
        return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)

"""The options of sampling that training has; the command line's help is generated from the texts below the fields."""

from dataclasses import dataclass

from beartype import BeartypeConf, beartype

from palm_rlhf.ops.sampling import RANGES
from palm_rlhf.training.run.config import Settings


@beartype(conf=BeartypeConf(is_pep484_tower=True))
@dataclass(frozen=True)
class SamplingConfig(Settings):
    """How training draws the tokens of responses.

    Of `palm_rlhf.ops.sampling.Sampling` it leaves out min-p and the penalties, since an update computes the
    log-probabilities of the responses again, and knows temperature, top-k and top-p only.
    """

    temperature: float = 1.0
    """Divides the logits in sampling."""

    top_k: int | None = None
    """Draw from the k likeliest tokens alone."""

    top_p: float | None = None
    """Draw from the smallest set of tokens that holds this mass."""

    def check_sampling(self) -> None:
        """Raise ValueError for an option out of its range, or at 0, where nothing is left to chance."""
        for name in ("temperature", "top_k", "top_p"):
            holds, expected = RANGES[name]
            self.expect(name, holds(getattr(self, name)), expected)
        self.expect_positive("temperature")
        self.expect("top_p", self.top_p is None or self.top_p > 0, "None or a number above 0")

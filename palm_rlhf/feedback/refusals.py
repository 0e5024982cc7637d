"""The error for what a person asked and does not get."""


class FeedbackError(ValueError):
    """A request that is refused.

    Args:
        status: Its HTTP status.
        retry_after: Seconds after which the same request may be answered, where waiting helps.
    """

    def __init__(self, message: str, status: int = 400, *, retry_after: float | None = None):
        super().__init__(message)
        self.status, self.retry_after = status, retry_after

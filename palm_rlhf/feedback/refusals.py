"""The error for what a person asked and does not get."""


class FeedbackError(ValueError):
    """A request that is refused; `status` is its HTTP status."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status

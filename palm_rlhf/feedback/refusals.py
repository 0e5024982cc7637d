"""The error for what a person asked and does not get."""


class FeedbackError(ValueError):
    """A request that is refused.

    The message is in the catalogues of the pages if it is written out where the error is raised.

    Args:
        message: The refusal in words; where there are values, they go into its fields, such as {most}.
        status: Its HTTP status.
        retry_after: Seconds after which the same request may be answered, where waiting helps.
        values: The values of the message's fields.
    """

    def __init__(self, message: str, status: int = 400, *, retry_after: float | None = None, **values: object):
        super().__init__(message.format(**values) if values else message)
        self.template, self.values = message, values
        self.status, self.retry_after = status, retry_after

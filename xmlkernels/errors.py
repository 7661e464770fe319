"""The one exception for a user's mistake."""


class InputError(ValueError):
    """A file, argument or setting that cannot be used, in one sentence.

    Args:
        where: which file and line, which op and argument, or which setting.
        expected: what should have stood there.
        got: what stood there.
        mend: how to put it right.
    """

    def __init__(self, where: str, expected: str, got: str, mend: str) -> None:
        self.where, self.expected, self.got, self.mend = where, expected, got, mend
        super().__init__(f"{where}: expected {expected}, got {got}; {mend}")

    def __reduce__(self) -> tuple[type["InputError"], tuple[str, str, str, str]]:
        # The default would rebuild it from the finished sentence and fail when it crosses a process
        # boundary.
        return type(self), (self.where, self.expected, self.got, self.mend)


class Failed(Exception):
    """Work that began and could not be finished: one sentence, exit status 1."""

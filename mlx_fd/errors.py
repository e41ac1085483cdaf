"""The one exception whose message is meant for the person at the keyboard."""


class UserError(Exception):
    """Something the user can mend: the message says what was wrong, where, and what to do.

    The command line prints it as it is, without a traceback, and exits with status 2.
    """


class NonFiniteWeights(UserError):
    """Weights that are no numbers.

    Attributes:
        name: of the first such array.
    """

    def __init__(self, message: str, name: str):
        super().__init__(message)
        self.name = name

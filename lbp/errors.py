"""What can go wrong, by who can mend it. The command line maps each kind to an exit code."""


class LbpError(Exception):
    """Base of every error that lbp explains itself; `code` is the exit code of the command."""

    code = 1


class ConfigError(LbpError):
    """The command or configuration is wrong. `problems` holds every one found, so that all are shown at once."""

    code = 2

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class Refused(ConfigError):
    """A rule cannot train this network or task, an arch cannot take these inputs: the message says why."""


class DataError(LbpError):
    """The data cannot be had or read."""

    code = 3


class Diverged(LbpError):
    """A loss or an update became non-finite; no weight has been touched by it."""

    code = 4


class OutOfResources(LbpError):
    """Memory or disk ran out."""

    code = 5

"""The base class of the package's own errors about what the user asked for."""


class UserError(Exception):
    """An error whose message tells the user what to change, so that the command line prints it without a traceback."""

"""The one exception that speaks to the user."""


class UserError(ValueError):
    """Something the user can mend; the commands print it without a traceback and exit with 2.

    The message says what was given, what is allowed and how to mend it.
    """

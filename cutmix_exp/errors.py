"""The one exception that speaks to the user."""


class UserError(ValueError):
    """Something the user can mend; the commands print it without a traceback and exit with 2.

    The message says what was given, what is allowed and how to mend it. Where several processes
    run, all of them meet it and the first tells it.
    """


class LocalError(UserError):
    """What one process of several has met alone (a broken file of its share) and tells itself."""

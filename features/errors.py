"""The one exception that means "the user can mend this"."""


class BadInputError(ValueError):
    """Input that breaks a documented rule.

    The message is one sentence that names the file, the column and the row or value where they
    apply. Commands print it and exit with status 2; library callers catch it as a ``ValueError``.
    """

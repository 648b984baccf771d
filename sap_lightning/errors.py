"""The one error a person is meant to read."""


class InputError(ValueError):
    """Bad input: the message says what is wrong, where (file, key, shape got and expected) and what to do.

    The command line prints it as one line without a traceback.
    """

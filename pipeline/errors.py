"""The one exception a user ever sees. It knows nothing about how it is printed."""


class PipelineError(Exception):
    """Bad input or a failed precondition, told in one sentence.

    The message names the file, key or value at fault and the way out. Stages print it on stderr
    and exit with code 1 (``stages/_app.py``).
    """

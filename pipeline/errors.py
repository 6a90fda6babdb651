"""The one exception a user ever sees, and other exceptions in its words. It knows nothing about how it is printed."""


class PipelineError(Exception):
    """Bad input or a failed precondition, told in one sentence.

    The message names the file, key or value at fault and the way out. Stages print it on stderr
    and exit with code 1 (``stages/_app.py``).
    """


def one_line(error: BaseException) -> str:
    """A library's exception as part of a sentence: its class and the start of what it says."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

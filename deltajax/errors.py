"""Failures of a run that are no fault of its arguments (those are ValueErrors): one line each, exit code 1."""


class RunError(RuntimeError):
    """A run cannot go on; the message is one line that says why and what is kept."""

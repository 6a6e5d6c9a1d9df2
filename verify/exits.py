"""The exit codes of the command line."""

PASSED, VIOLATED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

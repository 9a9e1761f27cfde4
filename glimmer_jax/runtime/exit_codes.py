"""Exit codes of the command line; launchers and schedulers decide by them whether to retry."""

DONE = 0
BUG = 1  # an error that nobody foresaw, with a traceback
INVALID_INPUT = 2  # settings, files or storage that must be changed first: do not retry
RETRY = 42  # preempted, or stopped by a temporary failure: the same command resumes
INTERRUPTED = 130  # Ctrl-C; resumes like RETRY, and nothing retries it by itself

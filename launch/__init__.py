"""Commands that start other commands: the quickstart."""

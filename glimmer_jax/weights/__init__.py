"""Parameters in files: ours and other people's, read through `load` and written."""

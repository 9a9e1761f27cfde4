"""From published corpus files to passages."""

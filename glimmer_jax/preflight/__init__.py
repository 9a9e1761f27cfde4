"""Whether a job fits a TPU slice that is not there: XLA's TPU compiler runs on any machine."""

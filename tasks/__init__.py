"""seqio registrations, nothing else: importing a module registers its tasks and mixtures."""

"""seqio registrations: importing a module registers its tasks and mixtures."""

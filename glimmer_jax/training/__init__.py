"""Training: state, optimiser, step, checkpoints, metrics, and the loop around them."""

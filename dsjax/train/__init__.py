"""Training: state, optimizer, losses, one step, and the loop around it."""

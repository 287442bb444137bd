"""Access to a rank's part of parameters, gradients and optimizer state, under each training strategy."""

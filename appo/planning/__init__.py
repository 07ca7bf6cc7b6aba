"""Memory and work of a training step, planned before anything is loaded: `appo plan`."""

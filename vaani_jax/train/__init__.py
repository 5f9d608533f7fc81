"""Training: config, optimizers, the jitted steps, the tuner and the loop."""

"""Loaders: each offers `next_step(n_disc) -> StepBatch`."""

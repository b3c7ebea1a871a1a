"""Optimizers and learning-rate schedules: one a file."""

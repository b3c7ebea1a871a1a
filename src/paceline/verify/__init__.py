"""Proof that a layout learns what one process learns."""

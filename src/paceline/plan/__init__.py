"""Arithmetic before anything runs: batch, memory, operations. No torch here."""

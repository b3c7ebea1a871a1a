"""Whole jobs: what a command does from start to end."""

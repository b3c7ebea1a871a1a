"""Passes over a model: each cuts, casts or wraps it in one way. One pass a file."""

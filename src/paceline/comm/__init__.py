"""Ranks, the replica's own world, and links between replicas."""

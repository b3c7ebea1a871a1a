"""How replicas agree with each other: one strategy a file."""

"""A parameter server: its logic, which does no input or output, and the wire that carries it."""

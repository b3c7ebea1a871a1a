"""A federated run whose clients are processes of their own: who they are, what is said on the wire, and its rounds."""

"""How tensors of several replicas are added up on the way: one reducer a file."""

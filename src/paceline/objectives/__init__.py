"""What is learned: each objective turns rows into a batch, and a batch into a sum of losses over its targets."""

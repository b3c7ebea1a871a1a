"""What the server of a federated run does with the mean update of a round: one rule a file."""

"""Secure aggregation: a server that learns the sum of what clients have, and nothing of any one of them."""

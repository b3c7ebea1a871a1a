"""Models: where they come from, how they are described without memory, and how their first values are made."""

"""In which order the micro-batches of a step run."""

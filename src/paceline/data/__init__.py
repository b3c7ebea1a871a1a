"""Data: find and read files, cut them into documents, tokenise once, then deal out rows of every step."""

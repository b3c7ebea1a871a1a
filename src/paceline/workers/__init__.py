"""Starting processes on this machine: the ranks of a run, and a pool of long-lived ranks."""

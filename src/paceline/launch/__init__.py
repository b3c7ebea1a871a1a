"""Engines that start the ranks of a run: this machine, torchrun."""

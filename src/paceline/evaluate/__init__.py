"""What a model is measured against, and how.

held_out.py    loss and bits per byte on text held out of training
sample.py      text that a model in training makes of a prompt
baselines.py   bits per byte of gzip and of a byte n-gram
"""

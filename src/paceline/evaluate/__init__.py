"""What a model is measured against, and how.

baselines.py   bits per byte of gzip and of a byte n-gram
"""

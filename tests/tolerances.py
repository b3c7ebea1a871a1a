"""Every tolerance of the tests, each with its reason. They are never relaxed to make a test pass."""

FP64_EQUAL = 1e-10
"""Relative. Two fp64 computations of the same sums in another order: rounding is near 1e-16 a term, times the thousands
of terms of a small model's gradient, with room for the fp32 parts (norms, rotary embedding) of some families, which see
the same inputs on both sides."""

FP32_LOSS = 1e-6
"""Relative. One fp32 forward pass in another order of sums."""

FP32_GRADIENT = 1e-5
"""Relative to the tensor's norm. One fp32 forward and backward pass in another order of sums."""

FP32_RUN = 1e-4
"""Relative. Weights after a few fp32 steps of plain SGD in another order of sums, whose differences add up."""

BF16_ATTENTION = 3 * 2.0**-9
"""Relative to the tensor's norm. Attention with fp32 scores and sums: probabilities, the gradients of scores and the
results are rounded to bf16 one after the other, by 2^-9 at most."""


FP16_LOSS = 2.0**-11
"""Relative. Another order of sums in fp16, which rounds by this much: the mean over a step's targets keeps no more."""

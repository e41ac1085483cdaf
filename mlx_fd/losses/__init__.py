"""The losses of a distillation step: pure, differentiable functions on MLX arrays.

Each returns (sum, count), both float32 scalars: the sum over the valid tokens (samples) and how
many there are. An update's loss is the sum of the sums over all its micro-batches divided by the
sum of the counts, so a batch of 8 gives what 4 batches of 2 give. What a mask leaves out cannot
poison anything, not even as NaN, neither the value nor a gradient.

The tests have a readable float64 twin of each (``tests/support/reference_losses.py``).
"""

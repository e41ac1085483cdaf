"""The losses of a distillation step: pure, differentiable functions on MLX arrays.

Each gives sums over valid tokens in float32, of each sample or of all. An update's loss is the sum
over all its micro-batches divided by how many tokens (samples) count in them, so a batch of 8 gives
what 4 batches of 2 give. What a mask leaves out cannot poison anything, not even as NaN, neither
the value nor a gradient.

The tests have a readable float64 twin of each (``tests/support/reference_losses.py``).
"""

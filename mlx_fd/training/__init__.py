"""The two trainers: the loop on problems, and self-distillation."""

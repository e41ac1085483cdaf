"""The self-distillation family: what the self-teacher sees, and what of it is matched."""

"""A model for other tools, and the comparison that shows it is the same model there."""

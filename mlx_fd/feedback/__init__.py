"""The method: an episode, the gate, what the student learns from, the update."""

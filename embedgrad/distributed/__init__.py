"""Several processes that work on one task, one for each GPU or share of a CPU: who they are, and what they exchange."""

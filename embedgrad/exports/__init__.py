"""Takes tuned prompts to other programs: one module for each target, and what they share."""

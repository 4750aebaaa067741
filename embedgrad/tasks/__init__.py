"""Real data sets, each as examples: where they come from, how they are checked, what counts as an answer."""

"""A search over settings: a study of Optuna whose trials are ordinary runs."""

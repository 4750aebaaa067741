"""Tuned prompts for another model: the displacement e − e₀ through translators that are fitted on shared tokens.

`shared` finds the tokens that two vocabularies have; `translators` are the maps; `alignment` re-tokenises; `carry`
makes the target's prompt; `arms` and `result` say what it is worth there, beside its text and a shuffled control.
"""

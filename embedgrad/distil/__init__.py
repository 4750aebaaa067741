"""Text for models that take no embeddings: candidates of many sources, each measured again as plain text.

`distil` goes through the sources; `candidates` makes texts of a soft prompt or of examples; `judges` asks other models;
`ledger` keeps what was done, so that a distillation can be stopped; `result` says what came out.
"""

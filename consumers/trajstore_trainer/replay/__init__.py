"""Training with the experts that the rollout used: in a `transformers` model, and as Megatron-Core takes them.

`trajstore_trainer` exports the names. Importing this package alone needs torch only.
"""

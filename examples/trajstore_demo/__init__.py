"""The main job as a demonstration: `trajstore demo`. Processes for rollout, archiver, materializer and trainer.

A small mixture-of-experts model is made on the spot and trained with GRPO on a task that a program can score; each
weight update aborts what is in flight, and the store is what the aborted rollouts resume from.
"""

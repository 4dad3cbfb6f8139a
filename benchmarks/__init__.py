"""Speed as ratios: what we do against the plainest way to move the same bytes, measured side by side in one run."""

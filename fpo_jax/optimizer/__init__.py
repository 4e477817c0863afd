"""AdamW with its schedule (adamw), and the rule that skips a step (skip_step)."""

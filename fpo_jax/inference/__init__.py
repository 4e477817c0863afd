"""What trained models do: causal_lm is one as a Flax module, sampler draws completions, reward_model scores them."""

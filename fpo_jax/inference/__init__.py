"""What trained models do: sampler draws completions, reward_model scores them."""

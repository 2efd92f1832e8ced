"""Head-to-head with other trainers: same weights, samples, masks and optimizer; loss, speed, and what was trained."""

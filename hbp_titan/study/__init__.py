"""What choices of the recipe do to the loss of held-out samples: runs that differ in one setting, over seeds."""

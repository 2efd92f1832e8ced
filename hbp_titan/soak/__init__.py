"""Soak: a run that is killed again and again, watched from outside, and compared with one that nothing disturbs."""

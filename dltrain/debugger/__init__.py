"""Seeing inside the training: statistics of tensors, rules that watch them, and what they found."""

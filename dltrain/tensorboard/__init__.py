"""TensorBoard: what a run shows there, tab by tab, and where its events go."""

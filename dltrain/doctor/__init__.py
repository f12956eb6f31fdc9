"""Whether a machine, its network and a planned job are fit to train: each check by itself, none of them changes
anything."""

"""What ``python -m benchmarks data`` consists of: the corpus, the peers' environment, and a module per contestant.

A contestant's module runs in a process of its own, ours in the project's interpreter and the others in the peers'. That
one lacks dltrain's dependencies but torch; of dltrain they import what lets torchvision be imported.
"""

"""Pipeline parallelism: the model cut into stages, pieces of the batch sent through them in the order of a schedule."""

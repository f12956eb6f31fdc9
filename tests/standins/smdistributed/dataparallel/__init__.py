"""A stand-in for SageMaker's data parallel library, on CPUs."""

"""Rules: pure functions of what is seen of each step, with SageMaker Debugger's names, parameters and defaults."""

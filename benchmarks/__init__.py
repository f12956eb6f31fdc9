"""What dltrain costs, measured side by side with a PyTorch loop that anybody would write.

python -m benchmarks trainer_overhead --quick
"""

"""``python -m dltrain.sagemaker``: the entry point of a training container."""

import sys

from dltrain.sagemaker.supervisor import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

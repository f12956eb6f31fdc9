"""``python -m dltrain`` is the command ``dltrain``."""

from dltrain.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())

"""`python scripts/train.py` is `mlframework-train`."""

from mlframework.cli.train import main

if __name__ == "__main__":
    main()

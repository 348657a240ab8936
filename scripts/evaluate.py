"""`python scripts/evaluate.py` is `mlframework-evaluate`."""

from mlframework.cli.evaluate import main

if __name__ == "__main__":
    main()

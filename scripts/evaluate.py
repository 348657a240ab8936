"""`python scripts/evaluate.py` is `mlframework-evaluate`."""

from mlframework.commands.evaluate import main

if __name__ == "__main__":
    main()

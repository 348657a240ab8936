"""`python scripts/generate.py` is `mlframework-generate`."""

from mlframework.cli.generate import main

if __name__ == "__main__":
    main()

"""`python scripts/compare.py` is `mlframework-compare`."""

from mlframework.cli.compare import main

if __name__ == "__main__":
    main()

"""`python scripts/table.py` is `mlframework-table`."""

from mlframework.cli.table import main

if __name__ == "__main__":
    main()

"""`mlframework-table`: the table of a sweep, made again from the records of its jobs."""

from __future__ import annotations

import argparse
from pathlib import Path

from mlframework.errors import UserError
from mlframework.screen import lasting_streams

__all__ = ["main"]


def main() -> None:
    """Prints the table of a folder's jobs, and writes it there as csv, as markdown and as a plot."""
    parser = argparse.ArgumentParser(prog="mlframework-table", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="of a sweep, as in multirun/mine; or of several")
    folder = parser.parse_args().folder

    from mlframework.cli.command_line import report, unread
    from mlframework.runs.sweep_report import report_sweep

    with lasting_streams() as streams:
        try:
            if not folder.is_dir():
                raise UserError(f"{folder}: {what_else(folder)}")
            if not report_sweep(folder):
                raise UserError(f"{folder}: holds no job of a sweep")
        except Exception as error:
            raise SystemExit(report(error).exit_code) from None
        if exit_code := unread(streams):
            raise SystemExit(exit_code)


def what_else(folder: Path) -> str:
    """What is wrong with a path that is no folder."""
    _, equals, path = str(folder).partition("=")
    if equals and Path(path).is_dir():
        return f"this command takes the folder alone: mlframework-table {path}"
    what = "is a file" if folder.exists() else f"there is no such folder, looked for at {folder.absolute()}"
    return f"{what}: must be the folder of a sweep, as in multirun/mine"


if __name__ == "__main__":
    main()

"""The report on a run, or on several beside each other: one HTML file that opens without a network, and a picture.

    python -m dschat.report output
    python -m dschat.report output output-2 --output compare.html

A directory is the output of e2e_rlhf.py or of one stage. Writes report.html and report.png into it; of several runs
report.html and report.png here, or where --output says.
"""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from dschat.errors import UserError, run_program
from dschat.report.page import write_page
from dschat.report.picture import write_picture
from dschat.report.run_files import load_run


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="python -m dschat.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", nargs="+", type=Path, help="output of e2e_rlhf.py or of one stage")
    parser.add_argument("--output", type=Path, help="the HTML file; the picture goes beside it")
    args = parser.parse_args(argv)
    names = distinct(args.directory)
    runs = [load_run(directory, name=name) for directory, name in zip(args.directory, names, strict=True)]
    path = args.output or (args.directory[0] if len(runs) == 1 else Path()) / "report.html"
    try:
        write_page(path, runs)
        picture = write_picture(path.with_suffix(".png"), runs)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); give another --output") from None
    sys.stdout.write(f"written to {path}" + (f", {picture}" if picture else "") + "\n")


def distinct(directories: list[Path]) -> list[str]:
    """The last part of each path, or the whole path where two end alike."""
    last = [directory.resolve().name for directory in directories]
    return [
        name if last.count(name) == 1 else str(directory) for name, directory in zip(last, directories, strict=True)
    ]


if __name__ == "__main__":
    run_program(main)

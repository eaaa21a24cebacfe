"""Write the tables of flags in docs/*.md anew, from the dataclasses that are their source.

    python docs/flags.py            after a change of a flag
    python docs/flags.py --check    exit 1 if a page is out of date

A page marks a table by `<!-- flags: module:Class -->` and `<!-- end -->`.
"""

import importlib
import re
import sys
from pathlib import Path

from dschat.config import flags_table

sys.path.append(str(Path(__file__).parents[1]))  # chat.py is a program, not part of an installed package
TABLE = re.compile(r"(<!-- flags: ([\w.]+):(\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def updated(page: str) -> str:
    def table(match: re.Match[str]) -> str:
        flags = getattr(importlib.import_module(match[2]), match[3])
        return f"{match[1]}\n{flags_table(flags)}\n\n{match[4]}"

    return TABLE.sub(table, page)


def main() -> int:
    stale = []
    for path in sorted(Path(__file__).parent.glob("*.md")):
        page = path.read_text(encoding="utf-8")
        if updated(page) != page:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(updated(page), encoding="utf-8")
    print(f"out of date: {', '.join(stale)}" if stale else "all tables are up to date")
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())

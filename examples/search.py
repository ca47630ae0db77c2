"""An index of texts that lives in the memory of a runner, and is asked from here.

It is a table of SQLite's in an object that is placed on the runner. It is fed and asked by calls of
its methods, one after the other, so it needs no locks.

    python examples/search.py                      searches this project's documentation
    python examples/search.py "runner dies" grace  the same, for something else
"""

from __future__ import annotations

import sqlite3
import sys
from pathlib import Path

from flame_dask import FlamePool

PAGES = Path(__file__).parents[1] / "docs"


class Index:
    """Sections of pages, by the words in them."""

    def __init__(self) -> None:
        self._table = sqlite3.connect(":memory:")
        self._table.execute("create virtual table sections using fts5 (page, title, text)")

    def add(self, page: str, text: str) -> int:
        """Take in a page; return how many sections there are now."""
        for section in text.split("\n## "):
            title, _, body = section.partition("\n")
            row = page, title.lstrip("# "), body
            self._table.execute("insert into sections values (?, ?, ?)", row)
        found: int = self._table.execute("select count(*) from sections").fetchone()[0]
        return found

    def search(self, words: str, count: int = 2) -> list[tuple[str, str, str]]:
        """Return page, title and a piece of the text of the sections that fit best."""
        return self._table.execute(
            "select page, title, snippet(sections, 2, '<', '>', '...', 9) from sections"
            " where sections match ? order by rank limit ?",
            (" ".join(f'"{word}"' for word in words.split()), count),
        ).fetchall()

    def close(self) -> None:
        """Stop. Called on the runner when the child is stopped."""
        self._table.close()


def main() -> None:
    with FlamePool("search", max=1, max_concurrency=2) as pool:
        index = pool.place_child(Index)
        print(f"there is {index}")
        pages = {str(path.relative_to(PAGES)): path for path in sorted(PAGES.rglob("*.md"))}
        added = [index.submit("add", name, path.read_text()) for name, path in pages.items()]
        print(f"it has {max(future.result() for future in added)} sections of {len(pages)} pages")
        for words in sys.argv[1:] or ["runner dies", "limit of time", "encryption"]:
            print(f"\n{words}?")
            for page, title, piece in index.search(words):
                print(f"  {page}, {title}: {' '.join(piece.split())}")
        index.stop()
        print(f"\nthere is {index}")


if __name__ == "__main__":
    main()

"""Rows labelled on Ray by a worker that writes down whom it was given: run by the tests, and killed by them.

python labelling.py FOLDER ROWS WORKERS [SECONDS]: goes on with FOLDER/part, then writes FOLDER/done.
"""

import json
import os
import sys
import time
from functools import partial
from pathlib import Path

from trimtab.batch.journal import open_journal
from trimtab.batch.on_ray import OnRay
from trimtab.batch.rows import Row
from trimtab.batch.runner import about, run


def rows_of(count):
    return [Row(f"r{number}", {"number": number}) for number in range(count)]


class Labelling:
    """Doubles numbers. Rows may say that the worker dies, dies once, raises, or leaves them out ("missing")."""

    def __init__(self, log, seconds=0.0):
        self.log, self.seconds = log, seconds

    def __call__(self, contents):
        for content in contents:
            if content.get("do") == "dies" or (
                content.get("do") == "dies once" and not os.path.exists(content["mark"])
            ):
                if "mark" in content:
                    Path(content["mark"]).touch()
                os._exit(9)
            if content.get("do") == "raises":
                raise ZeroDivisionError("this row divides by zero")
        time.sleep(self.seconds * len(contents))
        with open(self.log, "a") as file:  # appended in one write: lines of several workers do not mix
            file.write("".join(f"{content['number']} {os.getpid()}\n" for content in contents))
        return [content["number"] * 2 for content in contents if content.get("do") != "missing"]


def refuse():
    from trimtab.core.errors import UnreadableModel

    raise UnreadableModel("the labeller is gone.", "It was here.", "bring it back.")


def main(folder, count, workers, seconds="0.05"):
    folder, rows = Path(folder), rows_of(int(count))
    journal = open_journal(folder / "part", about(rows, {"labels": "double"}), "resume")
    counts = run(rows, partial(Labelling, str(folder / "log"), float(seconds)), journal, OnRay(int(workers), 2))
    (folder / "done").write_text(json.dumps([vars(outcome) for outcome in journal.outcomes([r.id for r in rows])]))
    journal.close()
    sys.stdout.write(json.dumps(vars(counts)) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])

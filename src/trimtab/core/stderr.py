"""What talkative libraries say on stderr, kept aside unless something goes wrong."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def captured_stderr() -> Iterator[None]:
    """Keeps what a talkative library and its children write from stderr; an error lets it out."""
    with tempfile.TemporaryFile() as aside, open(aside.fileno(), "w", encoding="utf-8", closefd=False) as words:
        sys.stderr.flush()
        usual = os.dup(2)
        os.dup2(aside.fileno(), 2)
        try:
            with contextlib.redirect_stderr(words):
                yield
        except BaseException:
            words.flush()
            aside.seek(0)
            os.write(usual, aside.read())
            raise
        finally:
            os.dup2(usual, 2)
            os.close(usual)

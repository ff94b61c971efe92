"""Request files for batches, and what comes out of them."""

import gzip
import json
from pathlib import Path


def chat(custom_id, content, **body):
    """One line: a chat request; greedy unless the body says otherwise."""
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0} | body
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def complete(custom_id, prompt, **body):
    """One line: a completion; greedy unless the body says otherwise."""
    body = {"prompt": prompt, "temperature": 0} | body
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def write_rows(path, rows) -> Path:
    """A request file, compressed where its name ends in .gz; texts stand as they are."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    content = "".join(f"{line}\n" for line in lines).encode()
    Path(path).write_bytes(gzip.compress(content) if str(path).endswith(".gz") else content)
    return Path(path)


def read_rows(path) -> list[dict]:
    """The rows of a file, compressed or not."""
    content = Path(path).read_bytes()
    content = gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
    assert content.endswith(b"\n")
    return [json.loads(line) for line in content.decode().split("\n")[:-1]]


def body(row):
    """The response body of a row that went well."""
    assert row["error"] is None, row["error"]
    assert row["response"]["status_code"] == 200
    return row["response"]["body"]


def texts(row) -> list[str]:
    """The texts of a row's choices."""
    return [choice["text"] if "text" in choice else choice["message"]["content"] for choice in body(row)["choices"]]

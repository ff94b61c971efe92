"""Request files: lines that cannot be used fail alone, ids are unique, outputs are whole or not there."""

import gzip
import json

import pytest

from trimtab.batch.files import encode_line, read_lines, read_records, result_file
from trimtab.core.errors import InputError


def request(custom_id="a", **changes):
    body = {"messages": [{"role": "user", "content": "Hello"}]}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body} | changes


def write(path, *lines):
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(texts) + b"\n")
    return path


def read(path):
    return read_lines(path, "transformers", ())


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"custom_id": "x"', "line 3: this is no JSON"),
        (b"\xff\xfe", "line 3: this is no JSON: 'utf-8'"),
        (b'{"custom_id": NaN}', "NaN is no JSON number"),
        (b'{"custom_id": "x", "body": {"metadata": [1e999]}}', "1e999 is larger than any number can be"),
        (b'{"custom_id": "x", "body": {"temperature": -1e400}}', "-1e400 is larger than any number can be"),
        (b"[" * 100000, "this is no JSON"),
        (b'"text"', "a request is an object, this is a str"),
        (request(method="GET"), 'method is "GET"'),
        (request(url="/v1/embeddings"), 'url is "/v1/embeddings".\n  Known: /v1/chat/completions, /v1/completions.'),
        (request(body=[]), "body is no object"),
        (request(body={}), "messages is null"),
        (request(custom_id=7), "custom_id is 7"),
        (request(custom_id=""), 'custom_id is ""'),
        (request(priority=1), "a request has no field 'priority'"),
        (request(body={"messages": [{"role": "user", "content": "x"}], "max_tokenz": 3}), "did you mean 'max_tokens'?"),
    ],
)
def test_a_line_that_cannot_be_used_says_why_and_fails_alone(tmp_path, line, says):
    first, bad, last = read(write(tmp_path / "in.jsonl", request("first"), b"  ", line, b"", request("last")))
    assert [first.row.id, last.row.id] == ["first", "last"]
    assert (last.number, bad.number) == (5, 3)
    assert bad.row is None
    assert bad.error.is_input
    assert "line 3: " in bad.error.message
    assert says in bad.error.message
    is_named = isinstance(line, dict) and line["custom_id"] == "a"
    assert bad.custom_id == ("a" if is_named else None)


def test_two_lines_of_one_custom_id_are_an_error_of_the_file(tmp_path):
    path = write(tmp_path / "in.jsonl", request("a"), request("b"), request("a", url="/nowhere"))
    with pytest.raises(InputError, match='lines 1 and 3: both have the custom_id "a"'):
        read(path)


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_a_file_without_rows_is_an_error(tmp_path, content):
    (tmp_path / "in.jsonl").write_bytes(content)
    with pytest.raises(InputError, match="holds no rows"):
        read(tmp_path / "in.jsonl")


def test_compressed_input_is_known_by_its_content_and_damage_is_told(tmp_path):
    plain = write(tmp_path / "in.jsonl", request("a"), request("b"))
    zipped = tmp_path / "in.bin"
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    assert read(zipped) == read(plain)
    zipped.write_bytes(zipped.read_bytes()[:-12])
    with pytest.raises(InputError, match="cannot be read"):
        read(zipped)
    with pytest.raises(InputError, match="cannot be read"):
        read(tmp_path / "missing.jsonl")


def test_line_breaks_of_other_kinds_and_a_byte_order_mark_are_no_trouble(tmp_path):
    body = {"messages": [{"role": "user", "content": "one\u2028two\u0085three"}]}
    raw = json.dumps(request("a", body=body), ensure_ascii=False).encode()
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + raw + b"\r\n" + json.dumps(request("b")).encode())
    lines = read(tmp_path / "in.jsonl")
    assert [line.row.id for line in lines] == ["a", "b"]
    assert lines[0].row.content["body"] == body


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz"])
def test_an_output_is_whole_or_not_there(tmp_path, name):
    path, records = tmp_path / name, [{"a": "é\ud800"}, {"a": "é"}]

    def write_all(fails):
        with result_file(path) as file:
            for record in records:
                file.write(encode_line(record))
            if fails:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_all(fails=True)
    assert list(tmp_path.iterdir()) == []
    write_all(fails=False)
    assert list(read_records(path)) == records
    assert path.read_bytes().startswith(b"\x1f\x8b") == name.endswith(".gz")
    first = path.read_bytes()
    write_all(fails=False)
    assert path.read_bytes() == first
    assert [file.name for file in tmp_path.iterdir()] == [name]

"""What `trimtab serve` does unless it is told otherwise. Imports nothing slow, so that the help is shown at once."""

from importlib.resources import files

PLAIN_TEMPLATE = (
    files("trimtab.serving.http") / "page" / "plain.jinja"
)  # of conversations, for tokenizers that have none
LOCAL = "127.0.0.1"
PORT = 8000
LARGEST_BODY_MIB = 8.0  # far beyond any prompt that fits a context
MOST_REQUESTS = 1024  # under way at once
CHOICES = 256  # of one prompt; vLLM itself would allow 16384
PROMPTS = 64  # of one request to /v1/completions; vLLM itself would allow 1024, and any number in a batch of chats

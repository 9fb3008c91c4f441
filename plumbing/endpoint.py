"""One request to an OpenAI-compatible endpoint: bounded in time and size, and its key is shown nowhere."""

import functools
import html
import json
import os
import queue
import re
import threading
import time
import urllib.error
import urllib.request
from urllib.parse import quote, urlsplit, urlunsplit

from plumbing.errors import BadInput

LONGEST = 4 << 20  # of a reply; verdicts have a few thousand letters [bytes]
PART = 8  # letters of a key in a row that are hidden


def chat_url(url):
    """Where the chat completions of --judge_url are. No error holds the address: a secret may be in it."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good or not re.fullmatch("[!-~]+", url):
        raise BadInput("--judge_url: not an address such as https://host/v1; correct it.")
    if "@" in parts.netloc:
        raise BadInput("--judge_url: a name or password is in the address; give the key in JUDGE_API_KEY.")
    path = parts.path.rstrip("/")
    path += ("" if path.endswith("/chat/completions") else
             "/chat/completions" if path.endswith("/v1") else "/v1/chat/completions")
    return urlunsplit(parts._replace(path=path, fragment=""))


def api_key():
    """The judge's key, "" without one. Files with Windows line ends leave a CR behind it."""
    for name in ("JUDGE_API_KEY", "OPENAI_API_KEY"):
        key = os.environ.get(name, "").strip()
        if not re.fullmatch("[ -~]*", key):
            raise BadInput(f"{name}: it has characters that no key has, as of a line end; set it again.")
        if key:
            return key
    return ""


def hidden(text, key):
    """The text without the key, also where it is escaped or only a part of it is there."""
    if len(key) < 4:  # as some local servers want one: not a secret
        return text
    spellings = {spelt.replace("\\", "").lower() for spelt in (key, quote(key, safe=""), html.escape(key))}
    size = min(PART, *map(len, spellings))
    pieces = {spelt[i:i + size] for spelt in spellings for i in range(len(spelt) - size + 1)}
    letters = [i for i, c in enumerate(text) if c != "\\"]  # JSON escapes some, in JSON once more
    bare, places = "".join(text[i] for i in letters), set()
    for i in range(len(bare) - size + 1):
        if bare[i:i + size].lower() in pieces:
            places.update(range(letters[i], letters[i + size - 1] + 1))
    return re.sub("\0+", "***", "".join("\0" if i in places else c for i, c in enumerate(text)))


class Stay(urllib.request.HTTPRedirectHandler):
    """The key goes to the host that was named and to no other."""

    def redirect_request(self, *args):
        return None


@functools.cache
def opener():
    return urllib.request.build_opener(Stay)


def post(url, body, key, seconds):
    """(status, headers, content of the reply) of a JSON body, within so many seconds in all, however slowly
    its bytes come. Of a reply that is too long only its first LONGEST bytes are read; its content is None."""
    until, answer = time.monotonic() + seconds, queue.SimpleQueue()
    headers = {"Content-Type": "application/json", "User-Agent": "dvpo",  # some hosts refuse urllib's own
               **({"Authorization": f"Bearer {key}"} if key else {})}

    def send():
        try:
            request = urllib.request.Request(url, json.dumps(body).encode(), headers)
            try:
                reply = opener().open(request, timeout=seconds)
            except urllib.error.HTTPError as e:  # a reply, too
                reply = e
            with reply:
                content = bytearray()
                while len(content) <= LONGEST and (part := reply.read1(1 << 16)):
                    content += part
                    if time.monotonic() > until:
                        return
            answer.put((reply.status, reply.headers, bytes(content) if len(content) <= LONGEST else None))
        except Exception as e:  # no connection, no HTTP
            answer.put(e)

    threading.Thread(target=send, daemon=True).start()  # a name server or a handshake can hold it, too
    try:
        found = answer.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no whole reply in {seconds:g} seconds") from None
    if isinstance(found, Exception):
        raise found
    return found


def plain(content):
    """The beginning of a reply as text, without the escapes that JSON can have for any letter."""
    try:
        return json.dumps(json.loads(content), ensure_ascii=False)[:10_000]
    except (ValueError, RecursionError):
        return content[:10_000].decode("utf-8", "replace")


def said_in(content):
    """The text of a reply, "" where what it holds is no text; None where it is no chat completion."""
    try:
        said = json.loads(content)["choices"][0]["message"].get("content")
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return None
    return said if isinstance(said, str) else ""

"""What secrets look like: names of files that hold them, and patterns of tokens, keys and passwords.

An escape (of JSON, of a URL, of HTML, of a quoted-printable mail) hides no secret, nor does base64; a Hub token is
also found where a line break divides it. A pattern that ordinary words could match asks for more: a digit, a length.
"""

from __future__ import annotations

import base64
import re

SECRET_NAME = re.compile(
    r"\.env(rc|\..*)?|[._]netrc|id_(rsa|dsa|ecdsa|ed25519)|.*\.(pem|key|p12|pfx|ppk|keystore)"
    r"|\.git-credentials|\.pypirc|\.npmrc|\.htpasswd|credentials(\.json)?|client_secret.*\.json|kaggle\.json"
    r"|stored_tokens|token",
    re.IGNORECASE,
)
# TensorBoard's folder, named after the machine: runs/Dec01_10-20-30_HOST
HOST_FOLDER = re.compile(rb"runs[/\\]{1,2}[A-Z][a-z]{2}[0-9]{2}_[0-9]{2}-[0-9]{2}-[0-9]{2}_")

_START = rb"(?<![A-Za-z0-9])"
_HUB = rb"(?:hf_(?:[a-z]{3,6}_)?|api_org_)"
_AWS_VALUE = rb"[\"']?\s{0,9}[=:]\s{0,9}[\"']?[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+])"
_MACHINE = rb"machine\s+\S{1,99}\s+login\s+\S{1,99}\s+password\s+[^\s<{$*.]\S{0,99}"
# what a guide writes in the place of a password
_EXAMPLE = rb"(?:your[-_]?)?(?:pass(?:word|wd|phrase)?|pwd|secret|token|hf_x*|x+|%s)@"
# (plain substring, which is fast over weights; full pattern; name of the kind)
SECRETS = (
    (b"hf_", re.compile(_START + rb"hf_(?:[a-z]{3,6}_)?[A-Za-z0-9]{20,}"), "Hugging Face token"),
    (b"api_org_", re.compile(_START + rb"api_org_[A-Za-z0-9]{20,}"), "Hugging Face token"),
    (b"PRIVATE KEY", re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY( BLOCK)?-----"), "private key"),
    (b"PuTTY-User-Key-File-", re.compile(rb"PuTTY-User-Key-File-[0-9]:"), "private key"),
    *((b"gh%c_" % one, re.compile(_START + rb"gh%c_[A-Za-z0-9]{36}" % one), "GitHub token") for one in b"pousr"),
    (b"github_pat_", re.compile(_START + rb"github_pat_[A-Za-z0-9]{20,}_?[A-Za-z0-9]*"), "GitHub token"),
    (b"glpat-", re.compile(_START + rb"glpat-(?=[A-Za-z_-]*[0-9])[A-Za-z0-9_-]{20,}"), "GitLab token"),
    (b"AKIA", re.compile(_START + rb"AKIA[0-9A-Z]{16}(?![A-Za-z0-9])"), "AWS key"),
    (b"ASIA", re.compile(_START + rb"ASIA(?=[A-Z]*[0-9])[0-9A-Z]{16}(?![A-Za-z0-9])"), "AWS key"),
    (b"aws_secret_access_key", re.compile(rb"aws_secret_access_key" + _AWS_VALUE), "AWS key"),
    (b"AWS_SECRET_ACCESS_KEY", re.compile(rb"AWS_SECRET_ACCESS_KEY" + _AWS_VALUE), "AWS key"),
    (b"AIza", re.compile(_START + rb"AIza[0-9A-Za-z_-]{35}(?![0-9A-Za-z_-])"), "Google API key"),
    (b"sk-", re.compile(_START + rb"sk-(?=[A-Za-z]{0,40}[0-9])[A-Za-z0-9]{20,}"), "API key"),
    (
        b"sk-",
        re.compile(_START + rb"sk-(?:ant|proj|svcacct|admin|or)-(?=[A-Za-z_-]{0,40}[0-9])[A-Za-z0-9_-]{20,}"),
        "API key",
    ),
    (b"pypi-AgE", re.compile(_START + rb"pypi-AgE[A-Za-z0-9_-]{30,}"), "PyPI token"),
    (b"xox", re.compile(_START + rb"xox[abprs]-[0-9]{6,}-[0-9A-Za-z-]{10,}"), "Slack token"),
    (b"machine", re.compile(_MACHINE), "netrc"),
    (
        b"://",
        re.compile(
            rb"://[A-Za-z0-9._%+-]{1,99}:(?!" + _EXAMPLE + rb")"
            rb"[^\s/@:\"'<>{}$*\\.|`][^\s/@\"'<>{}|`\\]{0,199}@[A-Za-z0-9\[]"
        ),
        "password in a URL",
    ),
)

# escapes that stand for one character
_ESCAPE = re.compile(
    rb"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|U([0-9a-fA-F]{8})|([abefnrtv])|([0-7]{1,3}))"
    rb"|%([0-9a-fA-F]{2})|=([0-9A-F]{2})|&#([0-9]{1,7});|&#[xX]([0-9a-fA-F]{1,6});"
)
_BASES = (16, 16, 16, 0, 8, 16, 16, 10, 16)  # of the number in each group; 0: the letter of a control character
_NESTED = 3  # escapes inside escapes: %253D, "\\u003d" inside JSON inside JSON

_BREAK = rb"(?:[ \t]*\\?\r?\n[ \t>#*]*)"
_DIVIDED = re.compile(_START + _HUB + rb"([A-Za-z0-9]{0,33}(?:" + _BREAK + rb"[A-Za-z0-9]{1,34}){1,3})(?![A-Za-z0-9])")
HUB_LETTERS = 34  # after the prefix of a Hub token

# "hf_" in base64: (pattern, what completes its first group of four, bytes that stand before it in that group)
_BASE64 = (
    (re.compile(rb"aGZf"), b"", 0),
    (re.compile(rb"[GWm2]hmX[z0-3]"), b"A", 1),
    (re.compile(rb"oZl[89]"), b"AAB", 2),
)
_LONGEST_BASE64 = 160  # characters to decode after the start of a token
_NOT_BASE64 = re.compile(rb"[^A-Za-z0-9+/_-]")
_BARE_TOKEN = re.compile(rb"hf_(?:[a-z]{3,6}_)?[A-Za-z0-9]{20,}")


def find_secret(content: bytes, token: str = "") -> str:
    """The kind of the first secret in these bytes; "" for none. `token`: one that no pattern knows."""
    own = token.encode() if len(token) >= 8 else b""
    for _ in range(1 + _NESTED):
        joined = b"".join(line.strip(b" \t\r\\") for line in content.split(b"\n"))
        kind = _find_plain(content, own) or _find_divided(content, joined, own) or _find_base64(joined, own)
        if kind:
            return kind
        decoded = _ESCAPE.sub(_decoded, content)
        if decoded == content:
            break
        content = decoded
    return ""


def _decoded(escape: re.Match[bytes]) -> bytes:
    """The character of an escape: itself in ASCII, else a space, which belongs to no secret."""
    group = escape.lastindex or 0
    digits, base = escape.group(group), _BASES[group - 1]
    if not base:
        return b"\n" if digits in b"nrvf" else b" "
    number = int(digits, base)
    return bytes([number]) if 0 < number < 128 else b" "


def _find_plain(content: bytes, own: bytes) -> str:
    if own and own in content:
        return "HF_TOKEN"
    return next((kind for needle, pattern, kind in SECRETS if needle in content and pattern.search(content)), "")


def _find_divided(content: bytes, joined: bytes, own: bytes) -> str:
    """A Hub token with line breaks in it; not two words on two lines, since the length of a token is known."""
    if own and own in joined:
        return "HF_TOKEN"
    for found in _DIVIDED.finditer(content) if b"hf_" in content or b"api_org_" in content else ():
        parts = re.split(_BREAK, found.group(1))
        lengths = [sum(map(len, parts[:count])) for count in range(2, len(parts) + 1)]
        if HUB_LETTERS in lengths and _is_mixed(b"".join(parts)[:HUB_LETTERS]):
            return "Hugging Face token"
    return ""


def _is_mixed(letters: bytes) -> bool:
    """Whether capitals stand inside, as in a random token and not in words."""
    return bool(re.search(rb"[a-z0-9][A-Z]", letters)) and bool(re.search(rb"[A-Z][a-z0-9]", letters))


def _find_base64(joined: bytes, own: bytes) -> str:
    """A Hub token in base64, whatever stands before it. `joined`: content without its line breaks."""
    if any(core in joined for core in _base64_cores(own)):
        return "HF_TOKEN, base64"
    for pattern, completion, before in _BASE64:
        for found in pattern.finditer(joined):
            run = _NOT_BASE64.split(joined[found.start() : found.start() + _LONGEST_BASE64], maxsplit=1)[0]
            if _BARE_TOKEN.match(_from_base64(completion + run), before):
                return "Hugging Face token, base64"
    return ""


def _base64_cores(own: bytes) -> list[bytes]:
    """The characters of base64 that a token gives for certain, for each number of bytes that may stand before it."""
    cores = []
    for before in range(3) if own else ():
        whole = base64.b64encode(b"\0" * before + own)
        cores.append(whole[-(-before * 8 // 6) : (before + len(own)) * 8 // 6])
    return cores


def _from_base64(run: bytes) -> bytes:
    return base64.b64decode(run[: len(run) // 4 * 4].translate(bytes.maketrans(b"-_", b"+/")))

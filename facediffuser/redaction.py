"""Credentials in URLs: found, refused, and kept out of every text.

One expression says what a credential is; settings refuse values with it (so does a Prefect server, which gets it as the
`pattern` of the fields' JSON schema, before it stores a flow run's parameters), and errors replace it by ***.
"""

import re


def _any_case(word: str) -> str:
    """Return an expression for a word in upper or lower case, without a flag, which JavaScript's lack inside a pattern."""
    return "".join(f"[{char.upper()}{char.lower()}]" if char.isalpha() else re.escape(char) for char in word)


_NAMES = ("awsaccesskeyid", "signature", "sig", "access_token", "token", "api_key", "apikey", "password", "passwd",
          "secret", "credential")  # fmt: skip
_QUERY = "[?&](?:" + "|".join([_any_case("x-amz-") + "[-A-Za-z0-9]*", _any_case("x-goog-") + "[-A-Za-z0-9]*",
                               *map(_any_case, _NAMES)]) + ")=(?![*]{3})"  # fmt: skip
# After a scheme, with one slash where a path was made of the URL: user@ or user:password@, also with a slash or a space
# in the password.
_SCHEME = ":/{1,2}"
_USER = "(?![*]{3}@)[^\\s/?#@]*@"
_PASSWORD = "(?![*]{3}@)[^\\s/@]*:[^@]*@"
# The same without a scheme, where nothing but the value stands: user:password@host.
_BARE = "[^\\s:/@'\"(]+:(?!/)[^\\s@'\"]+@"
_HOST = "[\\w\\[]"

_CREDENTIAL = re.compile(f"{_SCHEME}(?:{_USER}|{_PASSWORD})|{_QUERY}|^{_BARE}{_HOST}")
JSON_PATTERN = f"^(?![\\s\\S]*(?:{_SCHEME}(?:{_USER}|{_PASSWORD})|{_QUERY}))(?!{_BARE}{_HOST})"
"""A JSON schema `pattern` that no text with a credential matches."""

_REPLACED = (
    (re.compile(f"({_SCHEME})(?![*]{{3}}@)[^\\s/@]*:[^\\s'\"]*@"), r"\1***@"),
    (re.compile(f"({_SCHEME})(?:{_USER}|{_PASSWORD})"), r"\1***@"),
    (re.compile(f"({_QUERY})[^&\\s'\"]*"), r"\1***"),
    (re.compile(f"(?<![^\\s'\"(]){_BARE}(?={_HOST})"), "***@"),
)


def has_credentials(text: str) -> bool:
    """Return whether a URL (or a path made of one) carries a user name, a password or a signature."""
    return _CREDENTIAL.search(text) is not None


def redacted(text: str) -> str:
    """Return the text with *** in the place of user names, passwords and signatures in URLs."""
    for pattern, instead in _REPLACED:
        text = pattern.sub(instead, text)
    return text

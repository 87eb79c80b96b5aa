"""Credentials are taken out of texts, and nothing else is."""

import html
import json
import random
import re
import shlex
import string
from collections.abc import Callable, Iterator
from urllib.parse import quote, quote_plus

import pytest
import yaml

from edt_core.errors import UserError
from edt_core.printing.redaction import redacted, redacted_values

CASES = 1000
UNSPACED = string.ascii_letters + string.digits + string.punctuation + "éü語"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:pw@host/w.pth?sig=1&x=2#sha256=ab", "https://<redacted>@host/w.pth?<redacted>#sha256=ab"),
        ("postgresql+psycopg2://edt:pw@db:5432/mlflow", "postgresql+psycopg2://<redacted>@db:5432/mlflow"),
        ("s3://key:secret@bucket/a b", "s3://<redacted>@bucket/a b"),
        (
            "Max retries exceeded with url: /w.pth?access_token=abc (x)",
            "Max retries exceeded with url: /w.pth?access_token=<redacted> (x)",
        ),
        ("'https://token@host/x'", "'https://<redacted>@host/x'"),
        ("http://admin:one@two@host", "http://<redacted>@host"),
        ("http://me@corp.com:pw@host/", "http://<redacted>@host/"),
        ("redis://:pw@host/0", "redis://<redacted>@host/0"),
        ("http://admin:p?x@host/y?z=1", "http://<redacted>@host/y?<redacted>"),
        ("'http://admin:it's@host/x' is away", "'http://<redacted>@host/x' is away"),
        ("http://admin:p@ss word@host is away", "http://<redacted>@host is away"),
        ("http://u:p@host:5000 has no models:/x@champion", "http://<redacted>@host:5000 has no models:/x@champion"),
        ('{"uri":"http://u:p@h/x","mail":"a@b"}', '{"uri":"http://<redacted>@h/x","mail":"a@b"}'),
        ("postgresql://u:p@h/db?password=x", "postgresql://<redacted>@h/db?<redacted>"),
        ("host=h user=u password=it's dbname=d", "host=h user=u password=<redacted> dbname=d"),
        (r"password='a \' b' host=h", "password=<redacted> host=h"),
        ("AWS_SECRET_ACCESS_KEY=a/b+c, done", "AWS_SECRET_ACCESS_KEY=<redacted>, done"),
        ("run --password=x --token y z", "run --password=<redacted> --token <redacted> z"),
        ("['--token', 'x', 'y']", "['--token', '<redacted>', 'y']"),
        ('{"password": "a \\" b", "c": 1}', '{"password": "<redacted>", "c": 1}'),
        ("Authorization: Bearer abc.def", "Authorization: <redacted>"),
        ("{'Authorization': 'Basic bWU6cHc='}", "{'Authorization': '<redacted>'}"),
        ("X-Api-Key: abc", "X-Api-Key: <redacted>"),
        ("sent bearer abc1def2", "sent bearer <redacted>"),
    ],
)
def test_credentials_and_what_is_left(text: str, expected: str) -> None:
    assert redacted(text) == expected
    assert redacted(expected) == expected


@pytest.mark.parametrize("user", ["me:pw-canary", "pw_canary+", "a.pw-canary", "images:pw-canary@x"])
def test_what_is_no_container_of_azure_is_left_out(user: str) -> None:
    assert "canary" not in redacted(f"abfss://{user}@account.dfs.core.windows.net/x")


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/path@v1/x",
        "s3://bucket/a@b.png",
        "hf://datasets/x@main/a.parquet",
        "abfss://images@account.dfs.core.windows.net/a@b.png",
        "az://images@account.blob.core.windows.net",
        "models:/edt-s-2-256@champion",
        "git@host:path",
        "/data/me@work/a:b@c.png",
        "file:///data/a:b@c/d",
        "sqlite:////data/mlflow.db",
        "sqlite:////data/a:b@c.db",
        "see https://example.org/docs, or write to me@example.org",
        "http://mlflow:5000 is away: write to me@example.org",
        "http://mlflow:5000, or me@example.org",
        "http://127.0.0.1:9000/bucket/a@b.png",
        "http://[::1]:8080/a@b",
        "no dashboard at http://host:PORT",
        '{"uri":"http://h:5000","mail":"a@b"}',
        '{"uri":"http://h","mail":"a@b"}',
        "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN",
        "tokens=256, null_token=5",
        "the bearer of bad news",
        "a@b.c, 5?",
        "lr=0.1 & x=y",
    ],
)
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert redacted(text) == text


def passwords(alphabet: str, count: int = CASES) -> Iterator[str]:
    """Random ones of 4 to 20 characters, in which what ends other parts of a URL is frequent."""
    chance = random.Random(0)
    for _ in range(count):
        yield "".join(chance.choices(alphabet + "@/?#:'\"" * 4, k=chance.randint(4, 20)))


CONTEXTS: dict[str, Callable[[str], str]] = {
    "alone": str,
    "sentence": "cannot reach {}: connection refused".format,
    "option": "--tracking-uri={} failed".format,
    "assignment": "MLFLOW_TRACKING_URI={}".format,
    "brackets": "at ({}) and (http://other:80/)".format,
    "two": "{0} or {0}".format,
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("place", ["db.example.org", "db.example.org:5432/mlflow", "localhost/a"])
def test_no_part_of_a_password_stays(context: str, place: str) -> None:
    write = CONTEXTS[context]
    for password in passwords(UNSPACED):
        text, expected = write(f"http://admin:{password}@{place}"), write(f"http://<redacted>@{place}")
        assert redacted(text) == expected, text


@pytest.mark.parametrize("mark", ["'", '"'])
def test_no_part_of_a_password_in_quotes_stays(mark: str) -> None:
    ends = re.compile(rf"(@.*|^\d{{1,5}}){mark}")  # it reads like a host and the closing quote
    tried = [password for password in passwords(UNSPACED) if not ends.search(password)]
    assert len(tried) > CASES / 2
    for password in tried:
        text = f"{mark}http://admin:{password}@host/x{mark}, {mark}me@example.org{mark}"
        assert redacted(text) == f"{mark}http://<redacted>@host/x{mark}, {mark}me@example.org{mark}", text


def test_no_part_of_a_password_with_white_space_stays() -> None:
    """Without an `@` before the white space; and not as a port that a sentence follows."""
    for password in passwords(UNSPACED.replace("@", "") + "  \t"):
        password = password.replace("@", "")
        if password[:1].strip() and not re.match(r"/|\d{1,5}\W", password) and re.search(r"\w", password):
            text = f"cannot reach http://admin:{password}@db.example.org: refused"
            assert redacted(text) == "cannot reach http://<redacted>@db.example.org: refused", text


WRITTEN: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "percent": lambda text: quote(text, safe=""),
    "percent, in part": lambda text: quote(text, safe="/@:'"),
    "percent, small": lambda text: re.sub("%..", lambda found: found[0].lower(), quote(text, safe="")),
    "percent, twice": lambda text: quote(quote(text, safe=""), safe=""),
    "form": quote_plus,
    "json": json.dumps,
    "json in json": lambda text: json.dumps(json.dumps({"a": text})),
    "json, as it is": lambda text: json.dumps(text, ensure_ascii=False),
    "repr": repr,
    "repr in repr": lambda text: repr(repr([text])),
    "shell": shlex.quote,
    "shell, in a record": lambda text: json.dumps(shlex.join(["edt", f"--x={text}"])),
    "html": html.escape,
    "ascii": ascii,
    "yaml": lambda text: yaml.safe_dump({"a": text}, width=1000),
    "yaml, as it is": lambda text: yaml.safe_dump({"a": text}, width=1000, allow_unicode=True),
}


@pytest.mark.parametrize("way", WRITTEN)
def test_the_value_of_a_secret_variable_in_every_form(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in passwords(UNSPACED + "  \n", count=500):
        value = f"q7{value}7q"
        monkeypatch.setenv("MY_SECRET", value)
        text = WRITTEN[way](value)
        told = redacted(f"before {text} after")
        assert "<MY_SECRET>" in told, (value, text, told)
        assert not {"q7", "7q"} & {told[i : i + 2] for i in range(len(told))}, (value, text, told)
        assert told.startswith("before ")
        assert told.endswith(" after")


def test_the_password_of_a_variable_that_is_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the end of the value tells where the password ends, whatever is in it."""
    for password in passwords(UNSPACED + "  ", count=500):
        password = f"q7{password}7q"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://admin:{password}@mlflow:5000")
        told = redacted(f"cannot reach http://admin:{password}@mlflow:5000 (wrong password {password!r})")
        assert "q7" not in told, (password, told)
        assert "7q" not in told, (password, told)


def test_values_of_secret_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-1")
    monkeypatch.setenv("MY_API_KEY", "canary-2")
    monkeypatch.setenv("LONGER_TOKEN", "canary-1-longer")
    monkeypatch.setenv("HF_TOKEN", "abc")  # too short to be told from a word
    assert redacted("canary-1 abc canary-2") == "<AWS_SECRET_ACCESS_KEY> abc <MY_API_KEY>"
    assert redacted("canary-1-longer") == "<LONGER_TOKEN>"
    assert redacted_values({"a": ["canary-1", 1, None], "b": {"c": ("canary-2",)}}) == {
        "a": ["<AWS_SECRET_ACCESS_KEY>", 1, None],
        "b": {"c": ("<MY_API_KEY>",)},
    }
    assert str(UserError("no canary-1")) == "no <AWS_SECRET_ACCESS_KEY>"


def test_values_under_the_name_of_a_credential() -> None:
    values = {"password": "x", "hf_token": "y", "tokens": "z", "token": 5, "secret": None}
    assert redacted_values(values) == {**values, "password": "<redacted>", "hf_token": "<redacted>"}

"""Credentials are taken out of texts, and nothing else is."""

import pytest

from edt_core.errors import UserError
from edt_core.redaction import redacted, redacted_values


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
    ],
)
def test_what_urls_carry_beside_their_place(text: str, expected: str) -> None:
    assert redacted(text) == expected
    assert redacted(expected) == expected


@pytest.mark.parametrize(
    "text",
    ["s3://bucket/path@v1/x", "models:/edt-s-2-256@champion", "sqlite:////data/mlflow.db", "a@b.c, 5?", "lr=0.1 & x=y"],
)
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert redacted(text) == text


def test_values_of_secret_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-1")
    monkeypatch.setenv("MY_API_KEY", "canary-2")
    monkeypatch.setenv("HF_TOKEN", "abc")  # too short to be told from a word
    assert redacted("canary-1 abc canary-2") == "<AWS_SECRET_ACCESS_KEY> abc <MY_API_KEY>"
    assert redacted_values({"a": ["canary-1", 1, None], "b": {"c": ("canary-2",)}}) == {
        "a": ["<AWS_SECRET_ACCESS_KEY>", 1, None],
        "b": {"c": ("<MY_API_KEY>",)},
    }
    assert str(UserError("no canary-1")) == "no <AWS_SECRET_ACCESS_KEY>"

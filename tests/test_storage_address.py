"""Addresses of the database that mirrors a study."""

from __future__ import annotations

import gc

import pytest

from secateur.search.budget import Budget
from secateur.search.errors import UsageError
from secateur.search.mirror.address import check_storage, engine_url, masked
from secateur.search.settings.settings import identity, resolved, settings_from
from tests.test_mirror import address_of, closing, copy_of
from tests.toy import search, start

PASSWORD = "pa{}ss%40@word"


def test_passwords_are_masked(monkeypatch):
    from urllib.parse import quote

    address = f"postgresql://me:{quote(PASSWORD, safe='')}@host:5432/db"
    for text in (address, f"secateur search -o 'storage={address}' --run x", f"storage: {address}\nseed: 0"):
        hidden = masked(text)
        assert "pa%7B" not in hidden
        assert "://me:***@host:5432/db" in hidden
        assert len(hidden.splitlines()) == len(text.splitlines())
    assert masked("postgresql://me:p@ss/w@host/db") == "postgresql://me:***@host/db"
    assert masked("mysql://host/db?user=me&password=x&a=b") == "mysql://host/db?user=me&password=***&a=b"
    for plain in ("postgresql://me:${SECRET}@host/db", "postgresql://me@host/db", "sqlite:////tmp/a:b.db"):
        assert masked(plain) == plain


def test_the_environment_fills_in_a_password(monkeypatch):
    monkeypatch.setenv("SECRET", "s3")
    url = engine_url("postgresql://me:${SECRET}@host/db")
    assert (url.password, url.host) == ("s3", "host")
    assert url.drivername in ("postgresql+psycopg", "postgresql+psycopg2")
    monkeypatch.delenv("SECRET")
    with pytest.raises(UsageError, match="SECRET"):
        engine_url("postgresql://me:${SECRET}@host/db")


def test_a_password_with_braces_reaches_the_database(tmp_path):
    """Optuna fills a template with the address."""
    search(tmp_path / "run", Budget(evaluations=5))
    address = f"sqlite:///{tmp_path / 'a{b}.db'}"
    with start(tmp_path / "run") as study, closing(copy_of(study, address)) as copy:
        copy.catch_up()
    assert (tmp_path / "a{b}.db").exists()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("postgresql+psycopg://me:geheim@127.0.0.1:9/db", "127.0.0.1"),
        ("postgresql+psycopg://me:geheim@no-such-host.invalid/db", "no-such-host"),
        ("postgres://me:geheim@127.0.0.1/db", "'postgres'"),
        ("oracle+oracledb://me:geheim@127.0.0.1/db", "driver"),
        ("sqlite:////nowhere/at/all.db", "unable to open"),
        ("sqlite:///{garbage}", "not a database"),
        ("://me:geheim@", "such as postgresql"),
    ],
)
def test_a_storage_that_refuses_is_an_error_before_anything_is_changed(tmp_path, address, said):
    from secateur.search import app

    if "psycopg" in address:
        pytest.importorskip("psycopg")
    (tmp_path / "garbage").write_bytes(b"no database, but rather long" * 50)
    settings = settings_from({"storage": address.format(garbage=tmp_path / "garbage")})
    with pytest.raises(UsageError) as error:
        app.search(settings, tmp_path / "run")
    assert said in str(error.value)
    assert "geheim" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_storage_that_answers_is_no_error(tmp_path):
    check_storage(None)
    check_storage(address_of(tmp_path))
    gc.collect()


def test_storage_is_a_setting_that_may_change(monkeypatch):
    one, other = settings_from({"storage": "sqlite:///a.db"}), settings_from({"storage": "${DATABASE}"})
    assert identity(one) == identity(other)
    assert resolved(other)["storage"] == "${DATABASE}"
    with pytest.raises(UsageError, match="`storage` such as postgresql"):
        settings_from({"storage": "mirror.log"})

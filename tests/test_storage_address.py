"""Addresses of the database that mirrors a study."""

from __future__ import annotations

import gc

import pytest

from secateur.search.budget import Budget
from secateur.search.errors import UsageError
from secateur.search.mirror.address import check_storage, engine_url, masked, masked_address
from secateur.search.settings.settings import identity, load_settings, resolved, settings_from
from tests.mirrors import address_of, closing, copy_of
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
        ("postgresql+psycopg://me:${SECRET}@no-such-host.invalid/db", "no-such-host"),
        ("postgres://me:${SECRET}@127.0.0.1/db", "'postgres'"),
        ("oracle+oracledb://me:${SECRET}@127.0.0.1/db", "driver"),
        ("sqlite:////nowhere/at/all.db", "unable to open"),
        ("sqlite:///{garbage}", "not a database"),
        ("://me:geheim@", "such as postgresql"),
    ],
)
def test_a_storage_that_refuses_is_an_error_before_anything_is_changed(tmp_path, address, said, monkeypatch):
    from secateur.search import app

    if "psycopg" in address:
        pytest.importorskip("psycopg")
    monkeypatch.setenv("SECRET", "geheim")
    (tmp_path / "garbage").write_bytes(b"no database, but rather long" * 50)
    settings = settings_from({"storage": address.replace("{garbage}", str(tmp_path / "garbage"))})
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


# Ways to write a password into an address, right and wrong ones; "geheim" is in each password.
LITERAL = [
    "postgresql://me:geheim@host/db",
    "postgresql//me:geheim@host/db",
    "postgresql:me:geheim@host/db",
    "postgresql:/me:geheim@host/db",
    "postgresql:///me:geheim@host/db",
    "me:geheim@host/db",
    " postgresql ://me:geheim@host/db",
    "'postgresql://me:geheim@host/db'",
    "POSTGRESQL://me:geheim@host/db",
    "postgresql+psycopg://me:%40geheim%2F@host/db",
    "postgresql://me:geheim@[::1]:5432/db?sslmode=require",
    "postgresql://me:ge heim@host/db",
    "postgresql://me:geheim@ho st/db",
    "postgresql://me:a@geheim@host/db",
    "postgresql://me@there:geheim@host/db",
    "postgresql://me:a/geheim@host/db",
    "postgresql://me:geheim//@host/db",
    "postgresql://me:#geheim?@host/db",
    "postgresql://:geheim@host/db",
    "postgresql://me:${A}geheim@host/db",
    "postgresql://me:${A}@geheim@host/db",
    "postgresql://host/db?user=me&password=geheim",
    "postgresql://host/db?user=me&SSLPassword=ge heim&a=b",
    "mssql+pyodbc:///?odbc_connect=UID%3Dme%3BPWD%3Dgeheim",
    "sqlite://me:geheim@host/db",
    "jdbc:postgresql://me:geheim@host/db",
]

SAFE = [
    "postgresql://me:${PASSWORD}@host/db",
    "postgresql://${ME}:${PASSWORD}@[::1]:5432/db?sslmode=require",
    "postgresql://me:${PASSWORD}@host/db?application_name=a:b@c",
    "postgresql://me@host:5432/db",
    "postgresql://me:@host/db",
    "postgresql://host:5432/db",
    "postgresql://[::1]:5432/db",
    "mysql://host/db?user=me&password=${PASSWORD}",
    "postgresql://host/db?passfile=/home/me/.pgpass",
    "sqlite:////tmp/a:b@c.db",
    "sqlite+pysqlite:///a:b@c.db",
    "SQLite:///a:b@c/d e.db",
    "${DATABASE}",
]


@pytest.mark.parametrize("address", LITERAL)
def test_a_password_in_an_address_is_refused_and_shown_nowhere(tmp_path, address, monkeypatch):
    from secateur.search import app

    monkeypatch.setattr(
        "secateur.search.app.searching.check_storage", lambda address: pytest.fail("accepted")
    )
    said = []
    with pytest.raises(UsageError, match="Expected `storage` such as postgresql") as error:
        app.search(settings_from({"storage": address}), tmp_path / "run")
    said.append(str(error.value))
    for override in (
        f"storage:{address}",
        f"storage={address}: [",
        f"storage.url={address}",
        f"storage=[{address!r}]",
    ):
        with pytest.raises(UsageError) as error:
            app.search(load_settings(None, [override]), tmp_path / "run")
        said.append(str(error.value))
    assert not [line for line in said if "heim" in line or "\n" in line]
    assert not (tmp_path / "run").exists()
    if "://" in address:
        assert "Use ${VARIABLE}" in said[0]


@pytest.mark.parametrize("address", SAFE)
def test_an_address_without_a_password_in_it_is_kept_as_it_is(tmp_path, address, monkeypatch):
    from secateur.search import app

    def checked(given):
        assert given == address
        raise KeyboardInterrupt

    monkeypatch.setattr("secateur.search.app.searching.check_storage", checked)
    with pytest.raises(KeyboardInterrupt):
        app.search(settings_from({"storage": address}), tmp_path / "run")
    command = f"secateur search -o 'storage={address}' --run x@y:z"
    assert masked_address(address) == address
    assert masked(command) == command


def test_a_variable_may_hold_an_at_sign(monkeypatch):
    monkeypatch.setenv("SECRET", "ge@heim/#:%21")
    url = engine_url("postgresql://me:${SECRET}@host:5432/db")
    assert (url.username, url.password, url.host, url.port) == ("me", "ge@heim/#:!", "host", 5432)
    monkeypatch.setenv("DATABASE", "postgresql://me:ge@heim@host/db")
    with pytest.raises(UsageError, match="%40") as error:
        check_storage("${DATABASE}")
    assert "heim" not in str(error.value)


def test_a_command_with_a_password_ends_with_a_line_and_leaves_nothing(tmp_path, secateur):
    run = tmp_path / "run"
    for address in ("postgresql//me:geheim@host/db", "postgresql://me:geheim@ho st/db"):
        status, out, err = secateur("search", "--run", run, "-o", f"storage={address}")
        assert (status, out, len(err.splitlines())) == (2, "", 1)
        assert "me:***@ho" in err
        assert "geheim" not in err
    assert not run.exists()

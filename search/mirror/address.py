"""Addresses of databases: ``${NAMES}`` filled in, passwords hidden, and whether something answers."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from secateur.search.errors import UsageError

if TYPE_CHECKING:  # takes half a second to import
    import sqlalchemy

FORM = "postgresql://user:${PASSWORD}@host/database or sqlite:///file.db"
TIMEOUT_S = 5

# How each driver is told not to wait for ever.
_PSYCOPG = {"connect_timeout": TIMEOUT_S, "tcp_user_timeout": 4000 * TIMEOUT_S}  # the second one in ms
_CONNECT: Mapping[str, Mapping[str, Any]] = {
    "psycopg": _PSYCOPG,
    "psycopg2": _PSYCOPG,
    "pymysql": {"connect_timeout": TIMEOUT_S},
    "mysqldb": {"connect_timeout": TIMEOUT_S},
    "pysqlite": {"timeout": TIMEOUT_S},  # for a lock
}


def masked(text: str) -> str:
    """The text with the passwords of addresses in it replaced by ``***``; for all that people see."""
    text = re.sub(r"(://[^\s:/@]*:)(?!\$\{)[^\s]*@", r"\1***@", text)
    return re.sub(r"([?&](?:password|passwd|sslpassword)=)[^\s&]*", r"\1***", text)


def engine_url(address: str) -> sqlalchemy.engine.URL:
    """The address as SQLAlchemy takes it, ``${NAMES}`` of environment variables filled in.

    ``postgresql://`` means psycopg 3, or psycopg2 where only that is installed.

    Raises:
        UsageError: if it is no address, or a variable is not set.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    def value(found: re.Match[str]) -> str:
        if found[1] not in os.environ:
            raise UsageError(f"Expected ${{{found[1]}}} of `storage` in the environment, got none. Set it.")
        return os.environ[found[1]]

    try:
        url = make_url(re.sub(r"\$\{(\w+)\}", value, address))
    except UsageError:
        raise
    except (ArgumentError, ValueError):
        raise UsageError(f"Expected `storage` such as {FORM}, got {masked(address)}.") from None
    if url.drivername == "postgresql":
        installed = [name for name in ("psycopg", "psycopg2") if find_spec(name)]
        url = url.set(drivername=f"postgresql+{(installed or ['psycopg'])[0]}")
    return url


def engine_options(url: sqlalchemy.engine.URL) -> dict[str, Any]:
    """For ``create_engine``: no waiting without end, and no connection that has died meanwhile."""
    arguments = _CONNECT.get(url.get_dialect().driver, {})
    return {"connect_args": dict(arguments), "pool_pre_ping": True}


def reason_of(error: BaseException, address: str) -> str:
    """What a driver says, its first line and without the password."""
    original = getattr(error, "orig", None) or getattr(error.__cause__, "orig", None)
    words = (str(original or error).strip().splitlines() or [""])[0].rstrip(".")
    password = engine_url(address).password
    return masked(words.replace(password, "***") if password else words) or type(error).__name__


def check_storage(address: str | None) -> None:
    """Connect and look, so that a search begins with a database that is there; changes nothing in it.

    Args:
        address: of a database; None: nothing to check.

    Raises:
        UsageError: if it is no address, of an unknown kind, lacks its driver, or does not answer in time.
    """
    if address is None:
        return
    import sqlalchemy
    from sqlalchemy.exc import NoSuchModuleError, SQLAlchemyError

    url = engine_url(address)
    try:
        engine = sqlalchemy.create_engine(url, **engine_options(url))
    except NoSuchModuleError:
        raise UsageError(f"Expected `storage` such as {FORM}, got the kind {url.drivername!r}.") from None
    except ImportError as error:
        raise UsageError(
            f"Expected the driver of {url.drivername}, got: {error}. For PostgreSQL: pip install 'secateur[storage]'."
        ) from None
    try:
        sqlalchemy.inspect(engine).has_table("studies")
    except (SQLAlchemyError, OSError, ValueError) as error:
        raise UsageError(
            f"Expected a `storage` that answers, got {masked(address)}: {reason_of(error, address)}. "
            f"Mend the address or start the database, or leave `storage` out."
        ) from None
    finally:
        engine.dispose()

"""Addresses of databases: ``${NAMES}`` filled in, passwords hidden, connection checked."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from secateur.search.errors import UnavailableError, UsageError
from secateur.spaces.limited_text import cut

if TYPE_CHECKING:  # takes half a second to import
    import sqlalchemy

FORM = "postgresql://user:${PASSWORD}@host/database or sqlite:///file.db"
TIMEOUT_S = 5
_PORTS = {"postgresql": 5432, "mysql": 3306, "mariadb": 3306}

# Timeouts, by driver.
_PSYCOPG = {"connect_timeout": TIMEOUT_S, "tcp_user_timeout": 4000 * TIMEOUT_S}  # the second one in ms
_CONNECT: Mapping[str, Mapping[str, Any]] = {
    "psycopg": _PSYCOPG,
    "psycopg2": _PSYCOPG,
    "pymysql": {"connect_timeout": TIMEOUT_S},
    "mysqldb": {"connect_timeout": TIMEOUT_S},
    "pysqlite": {"timeout": TIMEOUT_S},  # for a lock
}


_SCHEME = re.compile(r"[^:@/]*:?//+")  # also without its colon
_FILE = re.compile(r"sqlite(\+\w+)?:///+$", re.IGNORECASE)  # a path may hold : and @
_NO_SECRET = re.compile(r"(\$\{\w+\})*(@[^@/?]*[/?].*)?")
_OPTION = re.compile(r"((?:passw(?:or)?d|pwd)(?:=|%3D))(?!\$\{\w+\}['\").,\]]*(?:&|$))[^&]+", re.IGNORECASE)


def masked(text: str) -> str:
    """Text with the passwords of addresses replaced by ``***``, for everything that is shown."""
    suspect = re.compile("//|passw|pwd", re.IGNORECASE).search
    return re.sub(r"\S+", lambda word: masked_address(word[0]) if suspect(word[0]) else word[0], text)


def masked_address(address: str) -> str:
    """Address, also a mistyped one, with ``***`` for whatever may be a password; ``${NAMES}`` stay."""
    scheme = found[0] if (found := _SCHEME.match(address)) else ""
    account, _, host = address[len(scheme) :].rpartition("@")
    user, _, password = account.partition(":")
    if not _FILE.search(scheme) and not _NO_SECRET.fullmatch(password):
        address = f"{scheme}{user}:***@{host}"
    return _OPTION.sub(r"\1***", address)


def readable(text: str, most: int = 60) -> str:
    """Text for a message: without passwords, and without its middle if it is long."""
    return cut(masked(text), most)


def refuse_password(address: str | None) -> None:
    """`UsageError` for an address with a password in it: a run keeps its settings, and others may read them."""
    if address is not None and (hidden := masked_address(address)) != address:
        raise UsageError(
            f"Expected `storage` such as {FORM}, got a password in {readable(hidden, 200)}. "
            "Use ${VARIABLE} in its place, and set that in the environment."
        )


def engine_url(address: str) -> sqlalchemy.engine.URL:
    """Address as SQLAlchemy takes it, with ``${NAMES}`` of environment variables filled in.

    ``postgresql://`` means psycopg 3, or psycopg2 where only that is installed.

    Raises:
        UsageError: if the address is not valid, or a variable is not set.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    def value(found: re.Match[str]) -> str:
        if found[1] not in os.environ:
            raise UsageError(f"Expected ${{{found[1]}}} of `storage` in the environment, got none. Set it.")
        text = os.environ[found[1]]
        return text.replace("@", "%40") if found.string[found.end() :].startswith("@") else text

    try:
        url = make_url(re.sub(r"\$\{(\w+)\}", value, address))
    except UsageError:
        raise
    except (ArgumentError, ValueError):
        url = None
    if url is None or "@" in (url.host or ""):  # the rest of a password, which messages would show as a host
        hidden = readable(masked_address(address), 200)
        raise UsageError(f"Expected `storage` such as {FORM}, got {hidden}. Write @ in a password as %40.")
    if url.drivername == "postgresql":
        installed = [name for name in ("psycopg", "psycopg2") if find_spec(name)]
        url = url.set(drivername=f"postgresql+{(installed or ['psycopg'])[0]}")
    return url


def engine_options(url: sqlalchemy.engine.URL) -> dict[str, Any]:
    """Options of ``create_engine``: a timeout for connecting, and a check of connections that were idle."""
    arguments = _CONNECT.get(url.get_dialect().driver, {})
    return {"connect_args": dict(arguments), "pool_pre_ping": True}


def reason_of(error: BaseException, address: str) -> str:
    """First line of a driver's error, without the password."""
    original = getattr(error, "orig", None) or getattr(error.__cause__, "orig", None)
    words = (str(original or error).strip().splitlines() or [""])[0].rstrip(".")
    password = engine_url(address).password
    return masked(words.replace(password, "***") if password else words) or type(error).__name__


def check_storage(address: str | None) -> list[str]:
    """Check, without changing anything, the database (None: none) before a search starts.

    Returns:
        A line if it is down: its host is there, and nothing listens at its port. The mirror catches up later.

    Raises:
        UsageError: if the address is not valid, its kind is unknown, its driver is missing, or it refuses the user.
    """
    if address is None:
        return []
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
        if _is_down(url):
            return [
                f"the database {masked_address(address)} does not answer; the search begins, and the mirror waits"
            ]
        raise (UnavailableError if url.host else UsageError)(
            f"Expected a `storage` that answers, got {masked_address(address)}: {reason_of(error, address)}. "
            f"Correct the address, start the database, or leave `storage` out."
        ) from None
    finally:
        engine.dispose()
    return []


def _is_down(url: sqlalchemy.engine.URL) -> bool:
    """True if a server's host has an address, and nothing listens there or answers in time."""
    if not url.host:
        return False
    try:
        place = socket.getaddrinfo(url.host, url.port or _PORTS.get(url.get_backend_name(), 0))[0][4]
    except (socket.gaierror, UnicodeError):
        return False
    try:
        socket.create_connection((str(place[0]), int(place[1])), timeout=TIMEOUT_S).close()
    except OSError:
        return True
    return False

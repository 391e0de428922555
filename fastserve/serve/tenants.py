"""Who is asking: API keys and the tenants behind them.

A key file has one key per line, as `KEY` or `TENANT KEY`; empty lines and lines that begin with # are left out. Keys of
the same tenant share its place in the queue. A key without a tenant's name gets one made from its hash, so that no
key shows up in a log, a metric or a file.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from pathlib import Path

from starlette.requests import Request

from fastserve.core.config import ServeConfig
from fastserve.core.errors import ConfigError

MAX_KEYS = 10_000


class KeyRing:
    """The keys that may come in. An empty ring asks for none."""

    def __init__(self, tenants: Mapping[str, str]) -> None:
        """
        Args:
            tenants: key -> tenant.
        """
        self._tenants = {_digest(key): tenant for key, tenant in tenants.items()}

    def __bool__(self) -> bool:
        return bool(self._tenants)

    @property
    def num_tenants(self) -> int:
        return len(set(self._tenants.values()))

    def tenant(self, authorization: bytes) -> str | None:
        """The tenant of an `Authorization` header; None when it has no key of ours.

        What is looked up is a hash, so that the time it takes tells nothing about a key.
        """
        kind, _, key = authorization.partition(b" ")
        digest = hashlib.sha256(key).digest()
        found = self._tenants.get(digest)
        is_bearer = hmac.compare_digest(kind.lower(), b"bearer")
        return found if is_bearer else None

    @classmethod
    def load(cls, config: ServeConfig) -> KeyRing:
        """The keys of `api_key_file`, or the one of the environment.

        Raises:
            ConfigError: the file cannot be read, has no key, or a line that is no key.
        """
        if not config.api_key_file:
            return cls({config.api_key: _name(config.api_key)} if config.api_key else {})
        try:
            lines = Path(config.api_key_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read api_key_file {config.api_key_file}: {error}") from error
        tenants: dict[str, str] = {}
        for number, line in enumerate(lines, 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if len(words) > 2 or words[-1] in tenants:
                problem = "has this key already" if words[-1] in tenants else "is neither KEY nor TENANT KEY"
                raise ConfigError(f"line {number} of api_key_file {config.api_key_file} {problem}")
            tenants[words[-1]] = words[0] if len(words) == 2 else _name(words[0])
        if not 0 < len(tenants) <= MAX_KEYS:
            raise ConfigError(f"api_key_file {config.api_key_file} must have 1 to {MAX_KEYS} keys, not {len(tenants)}")
        return cls(tenants)


def tenant_of(request: Request) -> str:
    """On whose account a request is; "" without API keys."""
    return str(getattr(request.state, "tenant", ""))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _name(key: str) -> str:
    return f"key-{_digest(key).hex()[:12]}"

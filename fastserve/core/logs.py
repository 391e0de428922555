"""One way to log: plain lines on stderr, set up once by whoever owns the process (command line or engine process).

Libraries use `logging.getLogger(__name__)` and configure nothing, so that an application that imports FastServe keeps
its own settings.
"""

from __future__ import annotations

import logging


def configure_logging(process: str, level: int = logging.INFO) -> None:
    """Send FastServe's log lines to stderr, marked with the name of this process."""
    line = logging.Formatter(f"%(asctime)s %(levelname)s {process}: %(message)s", datefmt="%H:%M:%S")
    target = logging.StreamHandler()
    target.setFormatter(line)
    logger = logging.getLogger("fastserve")
    logger.handlers[:] = [target]
    logger.setLevel(level)
    logger.propagate = False

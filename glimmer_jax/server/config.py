"""Settings of the server; imports none of its libraries."""

import dataclasses
import os
from pathlib import Path

from glimmer_jax.storage.json_lines import regular_file

TOKEN_VARIABLE = "GLIMMER_SERVE_TOKEN"


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """Address, access and operation of the server; `protocol.Limits` bounds single requests."""

    host: str = "127.0.0.1"  # loopback only; 0.0.0.0 for every interface
    port: int = 8000  # 0 takes a free port
    # Holds the bearer token that clients must send; without it the environment variable
    # GLIMMER_SERVE_TOKEN is read, and without either every client is served.
    token_file: str | None = None
    cors_origins: tuple[str, ...] = ()
    max_batch_delay_ms: float = 5.0  # milliseconds; see `batching.Batcher`
    max_queue: int = 256  # questions
    max_candidates: int = 2  # candidates of one request; their programs are compiled at the start
    request_timeout: float = 60.0  # seconds
    drain_timeout: float = 25.0  # seconds from the stop signal to the end
    log_json: bool = False
    log_questions: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise ValueError(f"PORT must be from 0 to 65535, got {self.port}.")
        for macro, seconds in (
            ("REQUEST_SECONDS", self.request_timeout),
            ("DRAIN_SECONDS", self.drain_timeout),
        ):
            if seconds <= 0:
                raise ValueError(f"{macro} must be above 0, got {seconds}.")
        if self.max_batch_delay_ms < 0:
            raise ValueError(
                f"MAX_BATCH_DELAY_MS must be 0 or more, got {self.max_batch_delay_ms}."
            )
        if self.max_queue < 1:
            raise ValueError(f"MAX_QUEUE must be at least 1, got {self.max_queue}.")
        if self.max_candidates < 0:
            raise ValueError(f"MAX_CANDIDATES must be 0 or more, got {self.max_candidates}.")
        if isinstance(self.cors_origins, str):
            raise ValueError(
                f"CORS_ORIGINS must be a list, such as ({self.cors_origins!r},), got a string."
            )

    def token(self) -> str | None:
        """The bearer token, or None. Raises ValueError for one that is missing or unusable."""
        if self.token_file is None:
            text, place = os.environ.get(TOKEN_VARIABLE), TOKEN_VARIABLE
            if not text:
                return None
        else:
            place = f"TOKEN_FILE: {self.token_file}"
            try:
                text = Path(regular_file(self.token_file)).read_text("utf-8")
            except (OSError, ValueError) as error:
                raise ValueError(f"{place} cannot be read: {error}.") from None
        token = text.strip()
        # No header can hold anything else.
        if not token or not token.isascii() or not token.isprintable():
            raise ValueError(f"{place} must hold one line of printable ASCII characters.")
        return token

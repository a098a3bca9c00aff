"""What the server allows and how long it waits."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from teasr.config import Settings


class ServerSettings(Settings):
    """Limits of the server; what is beyond them is refused with a sentence."""

    max_pixels: int = Field(4_000_000, ge=64)
    """Of one picture before it is enlarged. Four million pixels take 0.6 GB while their result is
    encoded."""
    max_megabytes: float = Field(32, gt=0)
    """Of one request's body, in 2^20 bytes; base64 makes a picture a third larger."""
    queue: int = Field(32, ge=1)
    """Pictures that are accepted at a time, waiting or worked on; their files are in memory."""
    timeout: float = Field(120, gt=0)
    """Seconds that a request may take once its body has arrived."""
    body_timeout: float = Field(30, gt=0)
    """Seconds within which a request's body must arrive."""
    poll: float = Field(5, gt=0)
    """Seconds between two looks at where an alias points."""
    record_inputs: Path | None = None
    """File for statistics of the pictures that come in; see `teasr.drift`."""

    @property
    def max_bytes(self) -> int:
        """Of one request's body."""
        return int(self.max_megabytes * (1 << 20))

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def album(tmp_path_factory: pytest.TempPathFactory, photo: Callable[..., np.ndarray]) -> Path:
    """Five pictures, PNG and JPEG, whose sides are no multiples of 4."""
    folder = tmp_path_factory.mktemp("photographs") / "album"
    folder.mkdir()
    for i in range(5):
        picture = Image.fromarray(photo(97 + i, 122 + i, seed=i))
        picture.save(folder / f"p{i}.{'jpg' if i == 2 else 'png'}")
    return folder


@pytest.fixture(scope="session")
def hr(album: Path, ray_session: None) -> str:
    """The album as HR shards of two pictures."""
    from pipelines.ingest import ingest

    return ingest([str(album)], str(album.parent / "hr"), shard_size=2).destination

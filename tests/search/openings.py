"""Studies that a test opens without preparing them: their config, and what would be prepared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from actors.types import Prepared
from search.config import Config, parse_config
from search.folder import StudyFolder

TOKENS = {"search": 90, "search.forward": 100, "choice.forward": 50, "test.forward": 400}
PREPARED = Prepared("", "", (), 10**9, {}, TOKENS, {}, {}, reused=True)


def config_of(tmp_path: Path, **sections: Any) -> Config:
    """Of a study whose factor store is nowhere, so with a sampler that reads none."""
    hub = {"model": {"source": "org/model"}, "text": {"source": "org/text"}}
    return parse_config(
        {"study": "s", "runs": str(tmp_path), "sampler": {"name": "random"}, **hub, **sections}
    )


def folder_of(config: Config) -> StudyFolder:
    return StudyFolder(config.folder, config, PREPARED)

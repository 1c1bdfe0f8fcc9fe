"""Where runs, data sets and caches live: one folder, chosen once per process."""

import os
from pathlib import Path

from core.errors import LoRAError

ASSETS = Path(__file__).resolve().parent.parent / "assets"


class Workspace:
    """One folder with everything that the studio writes.

    Attributes:
        root: The folder itself.
        runs: One folder a run (see `studio.runs`).
        uploads: Data files that the user gave.
        cache: What can be made again: converted weights, what lists show of runs that are over.
        downloads: What the page may hand out to a browser, in the cache.
        incoming: Where Gradio puts what a browser sends, until it is taken over; in the cache.
    """

    def __init__(self, root: str | Path) -> None:
        """Opens `root` and makes what is missing in it.

        Raises:
            LoRAError: `root` is not a folder that can be written.
        """
        try:
            self.root = Path(root).expanduser().resolve()
            self.runs, self.uploads, self.cache = (self.root / name for name in ("runs", "uploads", "cache"))
            self.downloads, self.incoming = self.cache / "downloads", self.cache / "incoming"
            for folder in (self.runs, self.uploads, self.cache, self.downloads, self.incoming):
                folder.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError) as error:  # RuntimeError: the home of somebody unknown
            reason = error.strerror if isinstance(error, OSError) else error
            raise LoRAError(
                f"`--workspace` (={str(root)!r}) must be a folder that can be written ({reason}); "
                "name another one, or free some space."
            ) from error

    @classmethod
    def default(cls) -> "Workspace":
        """Opens `$LORA_STUDIO_HOME`, or `lora-studio` in the user's home folder."""
        return cls(os.environ.get("LORA_STUDIO_HOME") or Path.home() / "lora-studio")


def write_whole(path: Path, content: bytes) -> None:
    """Puts a file in the place of what is there, whole and on the disk, or not at all.

    Raises:
        OSError: It could not be written.
    """
    temporary = path.with_name(f".{path.name}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)

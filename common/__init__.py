"""What the experiments share. For notebooks and other programs: `from common import load, picture`."""

from common.images import picture
from common.loading import load

__all__ = ["load", "picture"]

"""What the experiments share. For notebooks and other programs: `from common import load, picture`."""

import sys

if sys.version_info < (3, 11) or sys.platform == "win32":
    _HERE = "Python " + sys.version.split()[0] + " on " + sys.platform
    print("error: Python 3.11 or newer is needed, on Linux or macOS (or in WSL); this is " + _HERE, file=sys.stderr)
    sys.exit(17)  # error_codes.NOT_INSTALLED

from common.images import picture
from common.loading import load

__all__ = ["load", "picture"]

# SPDX-License-Identifier: Apache-2.0
"""``python -m gpu3d`` is the command ``gpu3d``."""

import sys

from gpu3d.cli import main

sys.exit(main())

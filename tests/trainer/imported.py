"""What `killed` has imported once, for all of its processes."""

from __future__ import annotations

import gc

import matplotlib.figure  # noqa: F401
import sklearn.datasets  # noqa: F401
import tde_trainer.app
import tde_trainer.run  # noqa: F401

gc.freeze()

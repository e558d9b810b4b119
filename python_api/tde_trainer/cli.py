"""Entry point of the `tde` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or say how to install what it needs."""
    try:
        from tde_trainer.app import app
        from tde_trainer.ranks import leave
    except ModuleNotFoundError as error:
        # Only what the extra brings: a missing module of ours is a bug and keeps its traceback.
        if error.name is None or error.name.partition(".")[0] in {"tde_trainer", "tde_kernels"}:
            raise
        print(f'error: {error.name} is missing; pip install "tde_kernels[train]"', file=sys.stderr)
        raise SystemExit(2) from None
    try:
        app()
    except SystemExit as end:
        if not end.code:  # else other processes may be anywhere, and this one must not wait for them
            leave()
        raise


if __name__ == "__main__":
    main()

"""Entry point of the `tde` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or say how to install what it needs."""
    try:
        from tde_trainer.app import app

        app()
    except ModuleNotFoundError as error:
        # Only what the extra brings: a missing module of ours is a bug and keeps its traceback.
        missing = (error.name or "").partition(".")[0]
        if missing in {"", "tde_trainer", "tde_kernels"}:
            raise
        print(f'error: {missing} is missing; pip install "tde_kernels[train]"', file=sys.stderr)
        raise SystemExit(2) from None
    except SystemExit as end:
        if not end.code and "tde_trainer.ranks" in sys.modules:
            # Not after an error: other processes may be anywhere, and this one must not wait for them.
            sys.modules["tde_trainer.ranks"].leave()
        raise


if __name__ == "__main__":
    main()

"""``python -m tde_trainer``, which is also what ``accelerate launch -m tde_trainer`` starts."""

from tde_trainer.cli import main

main()

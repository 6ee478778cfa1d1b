"""`python -m smartdiff_jax` is `smartdiff`."""

from smartdiff_jax.cli import main

main()

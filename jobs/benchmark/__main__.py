"""`python -m jobs.benchmark`."""

from jobs.benchmark.command import main

main()

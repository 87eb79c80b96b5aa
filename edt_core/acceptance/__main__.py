"""`python -m edt_core.acceptance`."""

from edt_core.acceptance.command import main

if __name__ == "__main__":
    main()

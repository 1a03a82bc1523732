"""`python -m moesaic`: the command line without its script."""

from moesaic.cli.main import main

if __name__ == "__main__":
    main()

"""``python -m kantor``: the command line."""

from kantor.cli import main

if __name__ == "__main__":
    main()

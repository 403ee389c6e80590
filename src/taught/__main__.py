"""``python -m taught`` is the command ``taught``."""

from taught.cli.app import main

if __name__ == "__main__":
    main()

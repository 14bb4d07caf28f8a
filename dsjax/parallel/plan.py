"""What a run would need on devices that are not here: ``python -m dsjax.parallel.plan --help``."""

from dsjax.planning.command import main

if __name__ == "__main__":
    main()

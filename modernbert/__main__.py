"""`python -m modernbert` is the command `modernbert`, also where only the module can be named, such as under torchrun."""

from .cli import main

if __name__ == "__main__":
    main()

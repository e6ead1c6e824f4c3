"""`python -m modernbert` is the command `modernbert`, for programs that start modules, such as torchrun."""

from .cli import main

if __name__ == "__main__":
    main()
